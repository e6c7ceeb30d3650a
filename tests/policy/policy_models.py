"""Models and batches of the policy's tests, free of Megatron-Core and pytest."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

BASE = Path(__file__).parents[2] / "examples" / "countdown" / "base"


def write_odd_model(directory: Path, **changes: Any) -> Path:
    """A random model unlike the base: untied, vocabulary that 2 does not divide, GQA ratio 4, another head size.

    Every weight is drawn, norms too, so that no two tensors could be exchanged unnoticed.
    """
    settings: dict[str, Any] = {
        "vocab_size": 37,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "dtype": "float32",
    }
    model = Qwen3ForCausalLM(Qwen3Config(**(settings | changes)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.3 * noise if parameter.ndim == 1 else 0.15 * noise)
    model.save_pretrained(directory)
    return directory


def make_batch(vocab: int, *, groups: int = 6, samples: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of different lengths with rewards such that advantages are positive, negative and zero; two rows invalid.

    ``drift_BL`` is what the tests add to log-probs to get ratios on both sides of the clip range.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = groups * samples
    prompts = torch.randint(2, 7, (groups,), generator=generator).repeat_interleave(samples)
    responses = torch.randint(1, 10, (rows,), generator=generator)
    responses[0] = 14  # one row longer than all others: only its micro-batch needs the last columns
    columns = torch.arange(int((prompts + responses).max()))
    used_BL = columns < (prompts + responses)[:, None]
    rewards = torch.randint(0, 2, (groups, samples), generator=generator).float()
    rewards[0], rewards[1, 0], rewards[1, 1] = 0.0, 0.0, 1.0
    valid = torch.ones(rows, dtype=torch.bool)
    valid[[5, rows - 1]] = False
    return {
        "tokens_BL": torch.randint(1, vocab, used_BL.shape, generator=generator) * used_BL,
        "response_mask_BL": used_BL & (columns >= prompts[:, None]),
        "groups_B": torch.arange(groups).repeat_interleave(samples),
        "rewards_B": rewards.flatten(),
        "valid_B": valid,
        "drift_BL": 0.4 * torch.randn(used_BL.shape, generator=generator),
    }


def exact_model(directory: Path) -> Qwen3ForCausalLM:
    """The model of ``directory`` in float64 throughout: transformers' own norms and softmax drop to fp32."""
    model = Qwen3ForCausalLM.from_pretrained(directory, attn_implementation="sdpa").double().eval()
    for module in model.modules():
        if isinstance(module, Qwen3RMSNorm):
            module.forward = types.MethodType(_exact_norm, module)
    return model


def _exact_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def exact_stats(
    model: Qwen3ForCausalLM, batch: dict[str, torch.Tensor], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy ``[B, L]`` of each token under the tokens before it, 0 outside responses; one row at a time,
    without padding.
    """
    mask_BL = batch["response_mask_BL"]
    logprob_BL = torch.zeros(mask_BL.shape, dtype=next(model.parameters()).dtype)
    entropy_BL = logprob_BL.clone()
    for row, (tokens_L, mask_L) in enumerate(zip(batch["tokens_BL"], mask_BL, strict=True)):
        length = int(mask_L.nonzero().max()) + 1
        logp_LV = (model(tokens_L[None, :length]).logits[0] / temperature).log_softmax(-1)
        where = mask_L[:length].nonzero()[:, 0]
        logprob_BL[row, where] = logp_LV[where - 1, tokens_L[where]]
        entropy_BL[row, where] = -(logp_LV.exp() * logp_LV).sum(-1)[where - 1]
    return logprob_BL, entropy_BL
