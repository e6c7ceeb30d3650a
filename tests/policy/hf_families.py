"""Tiny random models of every supported family, and float64 logits of them, free of Megatron-Core and pytest."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
_SHAPE: dict[str, Any] = {
    "vocab_size": 37,  # 2 does not divide it
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}
# With few enough positions for 4 pairs of channels, so that pairs are kept, blended and divided.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 300.5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Case -> family and what differs from _SHAPE.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3_tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama": ("llama", {"num_key_value_heads": 6}),
    "llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama3_tied_head_dim": ("llama", {"rope_parameters": _LLAMA3, "head_dim": 12, "tie_word_embeddings": True}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
}


def config_of(case: str) -> dict[str, Any]:
    """The ``config.json`` of a case."""
    family, changes = CASES[case]
    return {"model_type": family, **_SHAPE, **changes}


def write_model(case: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model of a case; every weight is drawn, norms and biases too, so that no two could be exchanged unnoticed."""
    config_class, model_class = _CLASSES[CASES[case][0]]
    model = model_class(config_class(**config_of(case)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.3 * noise if name.endswith("norm.weight") else 0.2 * noise)
    model.to(dtype).save_pretrained(directory)
    return directory


def random_tokens(vocab: int) -> dict[str, torch.Tensor]:
    """Rows of different lengths, 4 of 80 positions and less; everything after a prompt of 3 tokens is response."""
    generator = torch.Generator().manual_seed(1)
    columns, lengths = torch.arange(80), torch.tensor([80, 33, 7, 61])
    used_BL = columns < lengths[:, None]
    tokens_BL = torch.randint(1, vocab, used_BL.shape, generator=generator) * used_BL
    return {"tokens_BL": tokens_BL, "mask_BL": used_BL & (columns >= 3)}


def transformers_log_probs(
    directory: Path, batch: dict[str, torch.Tensor], dtype: torch.dtype, temperature: float
) -> torch.Tensor:
    """``[B, L]``, 0 outside responses: what transformers says in ``dtype``, norms included."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=dtype).eval()
    if dtype == torch.float64:
        _widen_norms(model)
    with torch.no_grad():
        logits_BLV = model(batch["tokens_BL"]).logits[:, :-1] / temperature
    targets_BL1 = batch["tokens_BL"][:, 1:, None]
    logprob_BL = logits_BLV.log_softmax(-1).gather(2, targets_BL1).squeeze(2)
    return torch.nn.functional.pad(logprob_BL, (1, 0)) * batch["mask_BL"]


def _widen_norms(model: PreTrainedModel) -> None:
    """Transformers' norms compute in fp32 whatever they are given."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_exact_norm, module)


def _exact_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    normed: torch.Tensor = (
        self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
    )
    return normed
