"""Models, batches and float64 oracles of the policy's tests, free of Megatron-Core and pytest."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from megatron_rlvr.core import RolloutBatch, SamplingParams
from megatron_rlvr.rollout import EmbeddedEngine, load_tokenizer, pad_id

TEMPERATURE = 0.8
CLIP = 0.2
POSITIVE_WEIGHT = 0.7
BASE = Path(__file__).parents[2] / "examples" / "countdown" / "base"


def write_odd_model(directory: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
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
    }
    model = Qwen3ForCausalLM(Qwen3Config(**(settings | changes)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.3 * noise if parameter.ndim == 1 else 0.15 * noise)
    model.to(dtype).save_pretrained(directory)
    return directory


def random_batch(vocab: int) -> dict[str, torch.Tensor]:
    """Random tokens in rows of different lengths; one row is longer than all others."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 7, (6,), generator=generator).repeat_interleave(4)
    responses = torch.randint(1, 10, (24,), generator=generator)
    responses[0] = 14
    columns = torch.arange(int((prompts + responses).max()))
    used_BL = columns < (prompts + responses)[:, None]
    tokens_BL = torch.randint(1, vocab, used_BL.shape, generator=generator) * used_BL
    return _judged(tokens_BL, used_BL & (columns >= prompts[:, None]))


def sampled_batch(directory: Path) -> dict[str, torch.Tensor]:
    """What the embedded engine samples from ``directory`` for six prompts of different lengths."""
    tokenizer = load_tokenizer(directory)
    engine = EmbeddedEngine(directory, tokenizer, torch.device("cpu"))
    engine.resync(load_file(directory / "model.safetensors").items(), 0)
    sampling = SamplingParams(temperature=TEMPERATURE, max_new_tokens=10, samples_per_prompt=4, seed=11)
    prompts = ["259:07;", "111:03;", "123:06;", "48:", "7", "999:99;1+"]
    batch = RolloutBatch.from_samples(engine.generate(prompts, sampling), pad_id(tokenizer))
    return _judged(batch.tokens_BL, batch.response_mask_BL)


def _judged(tokens_BL: torch.Tensor, response_mask_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    """Six groups of four rows with advantages of both signs and zero, two rows invalid.

    ``drift_BL`` is added to log-probs to get ratios on both sides of the clip range.
    """
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randint(0, 2, (6, 4), generator=generator).float()
    rewards[0], rewards[1, 0], rewards[1, 1] = 0.0, 0.0, 1.0
    valid = torch.ones(24, dtype=torch.bool)
    valid[[5, 23]] = False
    return {
        "tokens_BL": tokens_BL,
        "response_mask_BL": response_mask_BL,
        "groups_B": torch.arange(6).repeat_interleave(4),
        "rewards_B": rewards.flatten(),
        "valid_B": valid,
        "drift_BL": 0.4 * torch.randn(tokens_BL.shape, generator=generator),
    }


def exact_model(directory: Path) -> Qwen3ForCausalLM:
    """The model of ``directory`` in float64 throughout: transformers' own norms and softmax drop to fp32."""
    model = Qwen3ForCausalLM.from_pretrained(directory, attn_implementation="sdpa").double().eval()
    for module in model.modules():
        if isinstance(module, Qwen3RMSNorm):
            module.forward = types.MethodType(_exact_norm, module)
    return model


def _exact_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    normed: torch.Tensor = (
        self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
    )
    return normed


def exact_stats(model: Qwen3ForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy ``[B, L]`` of each response token, 0 elsewhere, from one row at a time, without padding."""
    mask_BL = batch["response_mask_BL"]
    logprob_BL = torch.zeros(mask_BL.shape, dtype=torch.float64)
    entropy_BL = logprob_BL.clone()
    for row, (tokens_L, mask_L) in enumerate(zip(batch["tokens_BL"], mask_BL, strict=True)):
        length = int(mask_L.nonzero().max()) + 1
        logp_LV = (model(tokens_L[None, :length]).logits[0].double() / TEMPERATURE).log_softmax(-1)
        where = mask_L[:length].nonzero()[:, 0]
        logprob_BL[row, where] = logp_LV[where - 1, tokens_L[where]]
        entropy_BL[row, where] = -(logp_LV.exp() * logp_LV).sum(-1)[where - 1]
    return logprob_BL, entropy_BL


def exact_advantages(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """GRPO's, ``[B]`` float64: rewards of each group's valid rows, centred and scaled; 0 elsewhere."""
    valid_B, advantages_B = batch["valid_B"], torch.zeros(len(batch["valid_B"]), dtype=torch.float64)
    for group in range(int(batch["groups_B"].max()) + 1):
        members = (batch["groups_B"] == group) & valid_B
        rewards = batch["rewards_B"][members].double()
        if rewards.min() < rewards.max():
            advantages_B[members] = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    return advantages_B


def exact_loss(model: Qwen3ForCausalLM, batch: dict[str, torch.Tensor], old_logprobs_BL: torch.Tensor) -> torch.Tensor:
    """Token mean of ``-w min(r A, clip(r) A)``, with w on positive advantages, as the papers write it."""
    mask_BL = batch["response_mask_BL"] & batch["valid_B"][:, None]
    logprob_BL, _ = exact_stats(model, batch)
    ratio_T = (logprob_BL - old_logprobs_BL)[mask_BL].exp()
    advantage_T = exact_advantages(batch)[:, None].expand_as(mask_BL)[mask_BL]
    surrogate_T = torch.minimum(ratio_T * advantage_T, ratio_T.clamp(1 - CLIP, 1 + CLIP) * advantage_T)
    return -torch.where(advantage_T > 0, POSITIVE_WEIGHT, 1.0).mul(surrogate_T).mean()
