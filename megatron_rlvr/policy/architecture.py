"""What a Hugging Face ``config.json`` says about a model, and the Megatron-Core model that it describes.

`Architecture.of` is the one place that knows the families (Qwen2, Qwen3, Llama) and refuses what they do not cover.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rlvr.core import RLVRError

# model_type -> how people call it. All are pre-norm decoders with RMSNorm, grouped-query attention, RoPE and SwiGLU.
FAMILIES = {"qwen2": "Qwen2 and Qwen2.5", "qwen3": "Qwen3", "llama": "Llama"}
_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("rms_norm_eps", "max_position_embeddings"),
)
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# RoPE type -> the numbers it takes besides rope_theta.
_ROPE_TYPES: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}


@dataclass(frozen=True)
class Architecture:
    """The shape of a dense decoder.

    Attributes:
        vocab_size: Rows of the embedding in the file, before padding.
        hidden_size: Width of the residual stream.
        ffn_size: Width of the gate and of the up projection.
        layers: Number of layers of the whole model.
        query_heads: Attention heads.
        kv_heads: Key/value heads; each serves ``query_heads / kv_heads`` query heads.
        head_dim: Width of one head.
        norm_epsilon: Epsilon of every RMSNorm.
        max_positions: Longest sequence.
        tied: Whether the output layer is the embedding.
        qkv_bias: Whether query, key and value projections have biases.
        qk_norm: Whether queries and keys are normalised per head.
        rope: ``rope_theta``, ``rope_type`` and the numbers of that type.
    """

    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    max_positions: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    rope: Mapping[str, Any]

    @classmethod
    def of(cls, hf: Mapping[str, Any], source: object = "config.json") -> Architecture:
        """The architecture that a ``config.json`` of transformers 4 or 5 describes.

        Args:
            hf: Its content.
            source: Where it comes from, for the errors.

        Raises:
            RLVRError: If the model is of another family, or has something that its family can have and we cannot.
        """
        _check_family(hf, source)
        heads = int(hf["num_attention_heads"])
        return cls(
            vocab_size=int(hf["vocab_size"]),
            hidden_size=int(hf["hidden_size"]),
            ffn_size=int(hf["intermediate_size"]),
            layers=int(hf["num_hidden_layers"]),
            query_heads=heads,
            kv_heads=int(hf.get("num_key_value_heads") or heads),
            head_dim=int(hf.get("head_dim") or int(hf["hidden_size"]) // heads),
            norm_epsilon=float(hf["rms_norm_eps"]),
            max_positions=int(hf["max_position_embeddings"]),
            tied=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=hf["model_type"] == "qwen2",
            qk_norm=hf["model_type"] == "qwen3",
            rope=_rope(hf, source),
        )

    def check_divisible(self, tensor_parallel: int) -> None:
        """Refuse a number of tensor-parallel ranks that heads or the feed-forward width do not split over.

        Raises:
            RLVRError: Naming the key of ``config.json``.
        """
        for key, value in (
            ("num_attention_heads", self.query_heads),
            ("num_key_value_heads", self.kv_heads),
            ("intermediate_size", self.ffn_size),
        ):
            if value % tensor_parallel:
                raise RLVRError(
                    f"policy.tensor_parallel={tensor_parallel} does not divide the model's {key}={value}; "
                    "choose a divisor"
                )

    def widths(self, tensor_parallel: int) -> dict[str, int]:
        """Sides of one rank's matrices in the linear layers, by the keys of ``config.json`` that they come from."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size // tensor_parallel,
            "num_attention_heads x head_dim": self.query_heads * self.head_dim // tensor_parallel,
            "num_key_value_heads x head_dim": self.kv_heads * self.head_dim // tensor_parallel,
        }

    def transformer_settings(self) -> dict[str, Any]:
        """What this architecture fixes of Megatron-Core's TransformerConfig."""
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_size,
            "num_attention_heads": self.query_heads,
            "num_query_groups": self.kv_heads,
            "kv_channels": self.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.norm_epsilon,
            "qk_layernorm": self.qk_norm,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
        }

    def build(self, transformer: Any, layer_spec: Any, tensor_parallel: int, **stage: Any) -> torch.nn.Module:
        """Megatron-Core's GPTModel, or one pipeline stage of it, on the device of its configuration.

        Args:
            transformer: A TransformerConfig made with `transformer_settings`.
            layer_spec: Which classes its layers are made of.
            tensor_parallel: Ranks that the vocabulary is padded for.
            stage: ``pre_process``, ``post_process`` and ``vp_stage`` of a pipeline stage.
        """
        model = importlib.import_module("megatron.core.models.gpt.gpt_model").GPTModel(
            transformer,
            layer_spec,
            vocab_size=padded_vocab(self.vocab_size, tensor_parallel),
            max_sequence_length=self.max_positions,
            parallel_output=True,
            share_embeddings_and_output_weights=self.tied,
            position_embedding_type="rope",
            **stage,
        )
        # Megatron-Core's own takes an integer theta, and of llama3's four numbers only the factor.
        model.rotary_pos_emb.inv_freq = self.rope_frequencies().to(model.rotary_pos_emb.inv_freq.device)
        module: torch.nn.Module = model
        return module

    def rope_frequencies(self) -> torch.Tensor:
        """Radians per position of each pair of channels, ``[head_dim / 2]`` fp32 on the CPU.

        ``llama3`` keeps short wavelengths, divides long ones by ``factor`` and blends between (Llama 3.1,
        https://arxiv.org/abs/2407.21783, section 3.4, with the blend of its reference implementation).
        """
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        plain: torch.Tensor = 1.0 / (float(self.rope["rope_theta"]) ** exponent)
        if self.rope["rope_type"] == "default":
            return plain
        factor, *blend = (float(self.rope[key]) for key in _ROPE_TYPES[self.rope["rope_type"]])
        if not blend:
            return plain / factor
        low, high, original = blend
        turns = original / (2 * math.pi / plain)  # that a pair makes over the original context; transformers' rounding
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return kept * plain + (1.0 - kept) * plain / factor


def padded_vocab(vocab_size: int, parts: int) -> int:
    """``vocab_size`` rounded up to a multiple of ``parts``."""
    return -(-vocab_size // parts) * parts


def _check_family(hf: Mapping[str, Any], source: object) -> None:
    kind = hf.get("model_type") if isinstance(hf, Mapping) else None
    if kind not in FAMILIES:
        supported = ", ".join(f"{kind!r} ({name})" for kind, name in FAMILIES.items())
        raise RLVRError(
            f"policy.model={source} is of type {kind!r}; only the dense families {supported} can be trained"
        )
    missing = [key for key in _REQUIRED if key not in hf]
    if missing:
        raise RLVRError(f"{source}/config.json lacks {', '.join(missing)}; take the one that belongs to the weights")
    for key, wanted in (
        ("attention_bias", False),  # an output bias, too
        ("mlp_bias", False),
        ("use_sliding_window", False),
        ("hidden_act", "silu"),
        ("partial_rotary_factor", 1.0),  # transformers 5 keeps it with the RoPE
        ("dual_chunk_attention_config", None),
        ("quantization_config", None),
    ):
        value = hf.get(key, _given_rope(hf).get(key, wanted))
        if value != wanted:
            raise RLVRError(
                f"policy.model={source} has {key}={value!r}; of {FAMILIES[kind]} models only those with "
                f"{wanted!r} are supported"
            )


def _given_rope(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def _rope(hf: Mapping[str, Any], source: object) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5, or ``rope_theta`` and ``rope_scaling`` of 4, as the former."""
    given = _given_rope(hf)
    rope = {"rope_theta": hf.get("rope_theta", 10000.0), **given}
    rope["rope_type"] = given.get("rope_type", given.get("type", "default"))  # "type" is the older spelling
    if rope["rope_type"] not in _ROPE_TYPES:
        raise RLVRError(
            f"policy.model={source} has rope_type={rope['rope_type']!r}; of {FAMILIES[hf['model_type']]} models only "
            f"those with one of {', '.join(_ROPE_TYPES)} are supported"
        )
    missing = [key for key in _ROPE_TYPES[rope["rope_type"]] if key not in rope]
    if missing:
        raise RLVRError(
            f"{source}/config.json has rope_type={rope['rope_type']!r} without {', '.join(missing)}; take the one that "
            "belongs to the weights"
        )
    return rope
