"""What saves memory on GPUs: gradients accumulated by the GEMM itself, and optimizer state that waits on the host."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import torch


def gradient_accumulation_fusion() -> bool:
    """Whether Megatron-Core's layers can add weight gradients to ``main_grad`` in the GEMM.

    They need an extension of NVIDIA's apex. PyPI's package named apex is somebody else's: it is no such extension, and
    worth a warning.
    """
    if importlib.util.find_spec("apex") is not None and importlib.util.find_spec("amp_C") is None:
        warnings.warn(
            "the installed package apex is not NVIDIA's (its module amp_C is missing); run pip uninstall apex, and "
            "build NVIDIA's from https://github.com/NVIDIA/apex if you want its kernels",
            stacklevel=2,
        )
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    return bool(layers._grad_accum_fusion_available)


def move_optimizer_state(optimizer: Any, device: torch.device) -> int:
    """Bring every state tensor of Megatron's ``optimizer`` to ``device``; the step counters stay.

    fp32 master weights are parameters and no state: they stay as well.

    Returns:
        Bytes moved or already there.
    """
    moved = 0
    for state in _states(optimizer):
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                state[name] = value.to(device)
                moved += value.numel() * value.element_size()
    return moved


def _states(optimizer: Any) -> Iterator[dict[str, Any]]:
    """The state of every parameter, of every optimizer that Megatron has chained."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield from part.optimizer.state.values()
