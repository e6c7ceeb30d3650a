"""What ``policy.precision`` makes of Megatron-Core's settings: fp32, bf16, or bf16 whose layers multiply in FP8.

With ``fp8``, TransformerEngine casts the operands of the linear layers inside the transformer blocks (E4M3 forward,
E5M2 for gradients; https://arxiv.org/abs/2209.05433) under one of its scaling recipes. Embedding, norms, attention
scores, optimizer and the vocabulary head stay what they are with ``bf16``: the head's products are bf16, its statistics
fp32. No line of it has run on a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from megatron_rlvr.config import PolicyConfig
from megatron_rlvr.core import RLVRError

# Hopper's; mxfp8 is for Blackwell.
FP8_RECIPES = ("delayed", "tensorwise", "blockwise")
_DEFAULT_RECIPE = "delayed"  # Megatron-Core's
_BF16_LAYERS = ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
_CAPABILITY = (8, 9)  # Ada's and Hopper's (9, 0) tensor cores have FP8


def half(config: PolicyConfig) -> bool:
    """Whether weights and activations are bf16, with fp32 weights in the optimizer."""
    return config.precision != "fp32"


def dtype(config: PolicyConfig) -> torch.dtype:
    """Of weights and activations."""
    return torch.bfloat16 if half(config) else torch.float32


def row_multiple(config: PolicyConfig) -> int:
    """A rank's token slots per micro-batch are a multiple of this, which FP8 products need."""
    return 16 if config.precision == "fp8" else 1


def transformer_settings(config: PolicyConfig) -> dict[str, Any]:
    """Megatron-Core's TransformerConfig of this precision; ``policy.megatron.fp8*`` goes over it."""
    settings: dict[str, Any] = {
        "bf16": half(config),
        "params_dtype": dtype(config),
        "pipeline_dtype": dtype(config),
    }
    if config.precision == "fp8":
        parameters = bool(config.megatron.get("fp8_param_gather", False))
        settings |= {"fp8": "hybrid", "fp8_recipe": _DEFAULT_RECIPE, "fp8_param": parameters}
    return settings


def optimizer_settings(config: PolicyConfig) -> dict[str, Any]:
    """The same of its OptimizerConfig."""
    settings: dict[str, Any] = {"bf16": half(config), "params_dtype": dtype(config)}
    return settings | ({"fp8_recipe": _DEFAULT_RECIPE} if config.precision == "fp8" else {})


def check_precision(config: PolicyConfig) -> None:
    """Refuse a precision that this machine does not have, and options of FP8 that would do nothing or contradict.

    Importable without Megatron-Core, so that the launcher finds it before any rank starts.

    Raises:
        RLVRError: Naming the key and the mend.
    """
    options = config.megatron
    if config.precision != "fp8":
        stray = [key for key in options if key.startswith("fp8") or key in _BF16_LAYERS]
        if stray:
            raise RLVRError(
                f"policy.megatron.{stray[0]} does nothing with policy.precision={config.precision}; set it to fp8 or "
                "remove the key"
            )
        return
    recipe = options.get("fp8_recipe", _DEFAULT_RECIPE)
    if recipe not in FP8_RECIPES:
        raise RLVRError(f"policy.megatron.fp8_recipe is {recipe!r}; it is one of {', '.join(FP8_RECIPES)}")
    if options.get("first_last_layers_bf16") and recipe == "delayed":
        raise RLVRError(
            "policy.megatron.first_last_layers_bf16=true does not go with fp8_recipe=delayed, whose scales are kept "
            "for all layers at once; set policy.megatron.fp8_recipe to tensorwise or blockwise"
        )
    if options.get("fp8_param_gather") and not options.get("use_distributed_optimizer"):
        raise RLVRError(
            "policy.megatron.fp8_param_gather=true gathers the distributed optimizer's parameters; set "
            "policy.megatron.use_distributed_optimizer=true, too"
        )
    _check_machine()


def _check_machine() -> None:
    if not torch.cuda.is_available():
        raise RLVRError("policy.precision=fp8 needs an NVIDIA GPU (Ada, Hopper or newer); use bf16 or fp32 without one")
    if importlib.util.find_spec("transformer_engine") is None:
        raise RLVRError(
            "policy.precision=fp8 needs TransformerEngine; run: pip install 'megatron-rlvr[gpu]', or use bf16"
        )


def check_fp8_device() -> None:
    """Refuse a GPU without FP8; asks the device, which only a rank that computes on it should do.

    Raises:
        RLVRError: Naming the GPU.
    """
    if torch.cuda.get_device_capability() < _CAPABILITY:
        raise RLVRError(
            f"policy.precision=fp8 needs a GPU of compute capability 8.9 or above (Ada, Hopper or newer) and this is "
            f"{torch.cuda.get_device_name()}; use bf16"
        )


def check_fp8_sizes(widths: dict[str, int]) -> None:
    """Refuse layers that FP8 products cannot have.

    Args:
        widths: See `Architecture.widths`.

    Raises:
        RLVRError: Naming the width.
    """
    for key, width in widths.items():
        if width % 16:
            raise RLVRError(
                f"policy.precision=fp8 multiplies matrices whose sides are multiples of 16, but {key} leaves every "
                f"tensor-parallel rank {width}; use bf16 or another policy.tensor_parallel"
            )
