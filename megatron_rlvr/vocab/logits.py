r"""Log-probability and entropy from logits that exist, sharded over the vocabulary or not.

The forward pass reads the shard once and gathers four numbers per token; the backward pass talks to nobody. For
upstream gradients g of the log-probability and h of the entropy (target y, entropy H, temperature tau)

    tau * dz_j = g [j = y] - p_j (g + h (log p_j + H))

Work goes through blocks of rows, so that the temporaries stay small beside the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_rlvr.vocab import rows as row_passes
from megatron_rlvr.vocab.rows import Backend
from megatron_rlvr.vocab.shards import Placement, over_ranks, place
from megatron_rlvr.vocab.state import BASE, EXTENDED, TokenStats, Totals, finish, totals
from megatron_rlvr.vocab.torch_rows import TorchRows

_BLOCK_BYTES = 2 * 2**20
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def token_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
    shard: range | torch.Tensor | None = None,
    extras: bool = False,
    reuse_logits: bool = False,
    backend: Backend = "auto",
) -> TokenStats:
    """Log-probability of each target and entropy of each row, in nats, differentiable in ``logits``.

    Statistics are computed in fp32 (fp64 for fp64 logits); the gradient has the dtype of ``logits``. ``-inf`` logits
    are impossible tokens: they carry no mass and receive no gradient, and the log-probability of an impossible target
    is the constant ``-inf``, so it passes none on. With a group of more than one rank the forward
    pass does one all-gather of four numbers per token (eight with ``extras``) and merges them in rank order, so every
    rank holds the same bits; the backward pass does no collective and yields the gradient of this rank's shard.

    Args:
        logits: ``[T, V / tp]``, bf16, fp16, fp32 or fp64, of any strides.
        targets: ``[T]`` global token ids, int64. Ids outside the vocabulary have log-probability ``-inf``; checking
            them here would stall a GPU.
        group: Ranks over which the vocabulary is sharded; ``None`` when ``logits`` is the whole vocabulary.
        temperature: Divides the logits; a positive number, or a tensor ``[T]`` (or 0-d) that receives no gradient.
            Rows whose tensor temperature is not positive become NaN.
        vocab_size: Columns with a global id at or above it are padding, carry no mass and receive a zero gradient.
            ``None`` when there is no padding.
        shard: Global ids of this rank's columns where they are not the rank-th of equal parts: ``range(first, end)``
            for parts of unequal width, or int64 ``[V / tp]`` of distinct ids in any order.
        extras: Whether to compute `TokenExtras` in the same pass.
        reuse_logits: Write the gradient over ``logits`` in the backward pass instead of into a new tensor. Only for
            logits that nothing reads afterwards.
        backend: ``torch``, ``triton`` (CUDA only), or the better of the two that can run.

    Raises:
        ValueError: If a shape, dtype, device, temperature or size does not fit.
    """
    if logits.ndim != 2 or logits.dtype not in FLOATS:
        raise ValueError(f"logits must be a floating [T, V/tp] tensor, got {logits.dtype} {list(logits.shape)}")
    check_targets(targets, len(logits), logits)
    placement = place(shard, logits.shape[1], group, vocab_size)
    temperature_T = row_temperature(temperature, len(logits), logits)
    call = _Call(placement, temperature_T, placement.columns(targets), group, extras, reuse_logits, backend)
    return TokenStats.of(_TokenStats.apply(logits, call))  # type: ignore[no-untyped-call]


def check_targets(targets: torch.Tensor, count: int, like: torch.Tensor) -> None:
    """Refuse targets that are not int64 ``[count]`` on the device of ``like``."""
    if targets.dtype != torch.int64 or targets.shape != (count,):
        raise ValueError(f"targets must be int64 [T] with T = {count}, got {targets.dtype} {list(targets.shape)}")
    if targets.device != like.device:
        raise ValueError(f"targets are on {targets.device} but the logits or hidden states on {like.device}")


def row_temperature(temperature: float | torch.Tensor, count: int, like: torch.Tensor) -> torch.Tensor:
    """``temperature`` for each of ``count`` rows in the statistics' dtype; NaN where a tensor's is not positive."""
    dtype = row_passes.stats_dtype(like)
    if not isinstance(temperature, torch.Tensor):
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        return torch.full((count,), temperature, dtype=dtype, device=like.device)
    if temperature.shape not in ((), (count,)):
        raise ValueError(f"temperature must be a number or a tensor [T] with T = {count}, got {[*temperature.shape]}")
    if temperature.requires_grad:
        raise ValueError("temperature requires a gradient, which is not given; detach it")
    temperature_T = temperature.to(like.device, dtype).expand(count)
    return torch.where(temperature_T > 0, temperature_T, torch.nan)


@dataclass(frozen=True, slots=True)
class _Call:
    placement: Placement
    temperature_T: torch.Tensor
    columns_T: torch.Tensor
    group: dist.ProcessGroup | None
    extras: bool
    reuse_logits: bool
    backend: Backend


class _Context(FunctionCtx):
    saved_tensors: tuple[torch.Tensor, ...]
    call: _Call


class _TokenStats(torch.autograd.Function):
    """The custom gradient behind ``token_stats``; saves the logits and six numbers per token."""

    @staticmethod
    def forward(ctx: _Context, logits_TV: torch.Tensor, call: _Call) -> tuple[torch.Tensor, ...]:
        state = over_ranks(_shard_state(logits_TV, call), call.temperature_T, call.group)
        stats = finish(state, call.temperature_T)
        ctx.save_for_backward(logits_TV, *totals(state, stats, call.columns_T, call.temperature_T))
        ctx.call = call
        outputs = stats.flat()
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, grad_logprob_T: torch.Tensor, grad_entropy_T: torch.Tensor, *_: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        logits_TV, *saved = ctx.saved_tensors
        row_totals, real = Totals(*saved), ctx.call.placement.real
        grad_logprob_T = grad_logprob_T.masked_fill(row_totals.logprob == -torch.inf, 0.0)
        grad_TV = logits_TV if ctx.call.reuse_logits else torch.empty_like(logits_TV)
        grad_TV[:, real:] = 0.0
        if row_passes.choose(ctx.call.backend, logits_TV, _obstacle(logits_TV, ctx.call.placement)) == "triton":
            from megatron_rlvr.vocab import triton_rows

            triton_rows.write_gradient_(
                grad_TV[:, :real], logits_TV[:, :real], *row_totals, grad_logprob_T, grad_entropy_T
            )
            return grad_TV, None
        for rows, block in _blocks(logits_TV, ctx.call.placement):
            block.recall(row_totals.max[rows], row_totals.temperature[rows])
            grad_TV[rows, :real] = block.gradient(row_totals.select(rows), grad_logprob_T[rows], grad_entropy_T[rows])
        return grad_TV, None


def _obstacle(logits_TV: torch.Tensor, placement: Placement) -> str:
    """Why the kernels cannot read these logits in place; empty where they can."""
    if placement.masked_V is not None:
        return "padding columns lie among the real ones"
    return "" if logits_TV.stride(1) == 1 else "the columns of the logits are not adjacent in memory"


def _shard_state(logits_TV: torch.Tensor, call: _Call) -> torch.Tensor:
    if row_passes.choose(call.backend, logits_TV, _obstacle(logits_TV, call.placement)) == "triton":
        from megatron_rlvr.vocab import triton_rows

        real_TV = logits_TV[:, : call.placement.real]
        return triton_rows.shard_state(real_TV, call.columns_T, call.temperature_T, call.extras)
    state_TK = call.temperature_T.new_empty(len(logits_TV), EXTENDED if call.extras else BASE)
    for rows, block in _blocks(logits_TV, call.placement):
        state_TK[rows] = block.state(call.columns_T[rows], call.temperature_T[rows], extras=call.extras)
    return state_TK


def _blocks(logits_TV: torch.Tensor, placement: Placement) -> Iterator[tuple[slice, TorchRows]]:
    """Blocks of rows, copied in the statistics' dtype into buffers that the next block overwrites."""
    size = min(max(_BLOCK_BYTES // (8 * max(placement.real, 1)), 8), max(len(logits_TV), 1))
    buffers = TorchRows(size, placement.real, row_passes.stats_dtype(logits_TV), logits_TV.device)
    for start in range(0, len(logits_TV), size):
        rows = slice(start, min(start + size, len(logits_TV)))
        block_TV = buffers.logits[: rows.stop - rows.start]
        block_TV.copy_(logits_TV[rows, : placement.real])
        if placement.masked_V is not None:
            block_TV.masked_fill_(placement.masked_V, -torch.inf)
        yield rows, buffers
