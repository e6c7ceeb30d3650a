"""Which implementation of the row passes runs: plain torch, the reference, or the Triton kernels on CUDA."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal, Protocol

import torch

from megatron_rlvr.vocab.state import Totals
from megatron_rlvr.vocab.torch_rows import TorchRows

Backend = Literal["auto", "torch", "triton"]
_CPU_CHUNK_BYTES, _CUDA_CHUNK_BYTES = 64 * 2**20, 5 * 2**29

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """A chunk of logits to be filled by the caller, and the two passes over it; see `TorchRows`."""

    logits: torch.Tensor

    def state(self, columns_T: torch.Tensor, temperature_T: torch.Tensor, *, extras: bool) -> torch.Tensor:
        """State of the first ``len(columns_T)`` rows."""
        ...

    def recall(self, max_T: torch.Tensor, temperature_T: torch.Tensor) -> None:
        """Instead of `state`, where the statistics are known already."""
        ...

    def gradient(
        self,
        totals: Totals,
        grad_logprob_T: torch.Tensor,
        grad_entropy_T: torch.Tensor,
        active: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gradient in the raw logits; uses the chunk up."""
        ...


class TritonRows:
    """The Triton kernels over an fp32 chunk; the gradient is written in the dtype that the GEMMs want."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate an fp32 chunk and, for another ``dtype``, a buffer for its gradient."""
        self.logits = torch.empty(rows, width, dtype=torch.float32, device=device)
        self._grad = self.logits if dtype == torch.float32 else torch.empty_like(self.logits, dtype=dtype)

    def state(self, columns_T: torch.Tensor, temperature_T: torch.Tensor, *, extras: bool) -> torch.Tensor:
        """As `TorchRows.state`."""
        from megatron_rlvr.vocab import triton_rows

        return triton_rows.shard_state(self.logits[: len(columns_T)], columns_T, temperature_T, extras)

    def recall(self, max_T: torch.Tensor, temperature_T: torch.Tensor) -> None:
        """Nothing to do: the gradient kernel reads the logits themselves."""

    def gradient(
        self,
        totals: Totals,
        grad_logprob_T: torch.Tensor,
        grad_entropy_T: torch.Tensor,
        active: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `TorchRows.gradient`, in the dtype given at construction."""
        from megatron_rlvr.vocab import triton_rows

        logits_TV = self.logits[: len(totals.max)]
        if active is not None:
            logits_TV, totals = logits_TV[active], totals.select(active)
            grad_logprob_T, grad_entropy_T = grad_logprob_T[active], grad_entropy_T[active]
        grad_TV = self._grad[: len(totals.max)]
        triton_rows.write_gradient_(grad_TV, logits_TV, *totals, grad_logprob_T, grad_entropy_T)
        return grad_TV


def choose(backend: Backend, tensor: torch.Tensor, obstacle: str = "") -> Literal["torch", "triton"]:
    """The implementation that will run on ``tensor``; a debug line of this module's logger says which and why.

    Args:
        backend: What the caller asked for.
        tensor: Gives dtype and device.
        obstacle: Why the Triton kernels cannot be used, where the caller knows one.

    Raises:
        ValueError: If Triton is demanded where it cannot run.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}; give 'auto', 'torch' or 'triton'")
    if tensor.dtype == torch.float64:
        obstacle = "float64 statistics exist in torch only"
    elif tensor.device.type != "cuda":
        obstacle = f"the tensors are on {tensor.device.type}"
    elif not _has_triton():
        obstacle = "triton is not installed"
    if backend == "triton" and obstacle:
        raise ValueError(f"backend='triton' cannot run because {obstacle}; give backend='auto'")
    chosen: Literal["torch", "triton"] = "torch" if obstacle or backend == "torch" else "triton"
    _say(chosen, obstacle or f"backend={backend!r} on {tensor.device.type}")
    return chosen


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache(maxsize=64)
def _say(chosen: str, reason: str) -> None:
    logger.debug("vocabulary rows run in %s: %s", chosen, reason)


def chunk_size(rows: int, width: int, device: torch.device) -> int:
    """Rows of a chunk: enough to feed the GEMM, few enough for the buffers to stay small beside the logits."""
    if device.type == "cpu":
        fitting = min(max(_CPU_CHUNK_BYTES // (8 * max(width, 1)), 128), 256)
    else:
        fitting = min(max(_CUDA_CHUNK_BYTES // (4 * max(width, 1)) // 256 * 256, 1024), 8192)
    return min(fitting, max(rows, 1))


def open_rows(
    chosen: Literal["torch", "triton"], rows: int, width: int, *, like: torch.Tensor, grad_dtype: torch.dtype
) -> Rows:
    """Buffers for chunks of up to ``rows`` rows on the device of ``like``, with statistics in the dtype for it."""
    if chosen == "triton":
        return TritonRows(rows, width, grad_dtype, like.device)
    return TorchRows(rows, width, stats_dtype(like), like.device)


def stats_dtype(tensor: torch.Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
