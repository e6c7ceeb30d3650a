r"""Log-probability and entropy from logits that exist, sharded over the vocabulary or not.

The forward pass reads the shard once and gathers four numbers per token; the backward pass talks to nobody. For
upstream gradients g of the log-probability and h of the entropy (target y, entropy H, temperature tau)

    tau * dz_j = g [j = y] - p_j (g + h (log p_j + H))

Work goes through blocks of rows, so that the temporaries stay small beside the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_rlvr.vocab import rows as row_passes
from megatron_rlvr.vocab.nucleus import (
    Nucleus,
    check_share,
    cut_,
    finish_nucleus,
    lowest_logits,
    nucleus_gradient,
)
from megatron_rlvr.vocab.rows import Backend, Rows
from megatron_rlvr.vocab.shards import Placement, over_ranks, place
from megatron_rlvr.vocab.state import BASE, EXTENDED, TokenStats, Totals, finish, totals

_BLOCK_BYTES, _TRITON_BLOCK_BYTES = 2 * 2**20, 2**28
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
    nucleus: float | None = None,
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
        nucleus: Mass in (0, 1] of the nucleus whose entropy to compute as well, or ``None`` for none: the most probable
            tokens of the whole vocabulary that reach it, with all that tie with the least of them. With more than
            one rank the search for it takes three all-reduces of ``[T, 2050]`` fp64 sums (six for fp64 logits; none
            for 1, the whole row), and its result another all-gather of four numbers per token.
        reuse_logits: Write the gradient over ``logits`` in the backward pass instead of into a new tensor. Only for
            logits that nothing reads afterwards.
        backend: ``torch``, ``triton`` (CUDA only), or the better of the two that can run.

    Raises:
        ValueError: If a shape, dtype, device, temperature or size does not fit.
    """
    if logits.ndim != 2 or logits.dtype not in FLOATS:
        raise ValueError(f"logits must be a floating [T, V/tp] tensor, got {logits.dtype} {list(logits.shape)}")
    check_targets(targets, len(logits), logits)
    check_share(nucleus)
    placement = place(shard, logits.shape[1], group, vocab_size)
    temperature_T = row_temperature(temperature, len(logits), logits)
    call = _Call(placement, temperature_T, placement.columns(targets), group, extras, nucleus, reuse_logits, backend)
    outputs = _TokenStats.apply(logits, call)  # type: ignore[no-untyped-call]
    return TokenStats.of(outputs, nucleus=nucleus is not None)


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
    nucleus: float | None
    reuse_logits: bool
    backend: Backend


class _Context(FunctionCtx):
    saved_tensors: tuple[torch.Tensor, ...]
    call: _Call


class _TokenStats(torch.autograd.Function):
    """The custom gradient behind ``token_stats``; saves the logits and six numbers per token, 13 with a nucleus."""

    @staticmethod
    def forward(ctx: _Context, logits_TV: torch.Tensor, call: _Call) -> tuple[torch.Tensor, ...]:
        state = over_ranks(_shard_state(logits_TV, call), call.temperature_T, call.group)
        stats = finish(state, call.temperature_T)
        saved: tuple[torch.Tensor, ...] = totals(state, stats, call.columns_T, call.temperature_T)
        if call.nucleus is not None:
            nucleus_entropy_T, nucleus = _nucleus(logits_TV, state.max, call, call.nucleus)
            stats = replace(stats, nucleus_entropy=nucleus_entropy_T)
            saved = (*saved, *nucleus.flat())
        ctx.save_for_backward(logits_TV, *saved)
        ctx.call = call
        ctx.mark_non_differentiable(*stats.constant())
        return stats.flat()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, grad_logprob_T: torch.Tensor, grad_entropy_T: torch.Tensor, *more: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        logits_TV, *saved = ctx.saved_tensors
        row_totals, real = Totals(*saved[:6]), ctx.call.placement.real
        nucleus = None if ctx.call.nucleus is None else Nucleus.of(saved[6:])
        grad_logprob_T = grad_logprob_T.masked_fill(row_totals.logprob == -torch.inf, 0.0)
        grad_TV = logits_TV if ctx.call.reuse_logits else torch.empty_like(logits_TV)
        grad_TV[:, real:] = 0.0
        if nucleus is None and _chosen(logits_TV, ctx.call) == "triton":
            from megatron_rlvr.vocab import triton_rows

            triton_rows.write_gradient_(
                grad_TV[:, :real], logits_TV[:, :real], *row_totals, grad_logprob_T, grad_entropy_T
            )
            return grad_TV, None
        # Both copy a block before the gradient, which may take the place of the logits, is written.
        blocks, cut_blocks = _blocks(logits_TV, ctx.call), _blocks(logits_TV, ctx.call)
        for rows, block in blocks:
            block.recall(row_totals.max[rows], row_totals.temperature[rows])
            grad_tV = block.gradient(row_totals.select(rows), grad_logprob_T[rows], grad_entropy_T[rows])
            if nucleus is not None:
                _, cut_block = next(cut_blocks)
                grad_tV.add_(_cut_gradient(cut_block, nucleus.select(rows), more[0][rows]))
            grad_TV[rows, :real] = grad_tV
        return grad_TV, None


def _obstacle(logits_TV: torch.Tensor, placement: Placement) -> str:
    """Why the kernels cannot read these logits in place; empty where they can."""
    if placement.masked_V is not None:
        return "padding columns lie among the real ones"
    return "" if logits_TV.stride(1) == 1 else "the columns of the logits are not adjacent in memory"


def _chosen(logits_TV: torch.Tensor, call: _Call) -> Literal["torch", "triton"]:
    return row_passes.choose(call.backend, logits_TV, _obstacle(logits_TV, call.placement))


def _shard_state(logits_TV: torch.Tensor, call: _Call) -> torch.Tensor:
    if _chosen(logits_TV, call) == "triton":
        from megatron_rlvr.vocab import triton_rows

        real_TV = logits_TV[:, : call.placement.real]
        return triton_rows.shard_state(real_TV, call.columns_T, call.temperature_T, call.extras)
    state_TK = call.temperature_T.new_empty(len(logits_TV), EXTENDED if call.extras else BASE)
    for rows, block in _blocks(logits_TV, call):
        state_TK[rows] = block.state(call.columns_T[rows], call.temperature_T[rows], extras=call.extras)
    return state_TK


def _nucleus(logits_TV: torch.Tensor, max_T: torch.Tensor, call: _Call, share: float) -> tuple[torch.Tensor, Nucleus]:
    """Nucleus entropies and what their gradient needs; ``max_T`` is over all shards."""
    lowest_T = lowest_logits(
        lambda: ((rows, block.logits[: rows.stop - rows.start]) for rows, block in _blocks(logits_TV, call)),
        max_T,
        call.temperature_T,
        share,
        call.group,
    )
    cut_TK = call.temperature_T.new_empty(len(logits_TV), BASE)
    for rows, block in _blocks(logits_TV, call):
        cut_(block.logits[: rows.stop - rows.start], lowest_T[rows])
        cut_TK[rows] = block.state(call.columns_T[rows], call.temperature_T[rows], extras=False)
    return finish_nucleus(cut_TK, lowest_T, call.columns_T, call.temperature_T, call.group)


def _cut_gradient(block: Rows, nucleus: Nucleus, grad_nucleus_T: torch.Tensor) -> torch.Tensor:
    """Gradient in a block of raw logits of ``sum(g * nucleus entropy)``."""
    cut_(block.logits[: len(grad_nucleus_T)], nucleus.lowest)
    block.recall(nucleus.totals.max, nucleus.totals.temperature)
    return nucleus_gradient(block, nucleus, grad_nucleus_T)


def _blocks(logits_TV: torch.Tensor, call: _Call) -> Iterator[tuple[slice, Rows]]:
    """Blocks of rows, copied in the statistics' dtype into buffers that the next block overwrites."""
    placement, dtype, chosen = call.placement, row_passes.stats_dtype(logits_TV), _chosen(logits_TV, call)
    budget = _BLOCK_BYTES if chosen == "torch" else _TRITON_BLOCK_BYTES
    size = min(max(budget // (8 * max(placement.real, 1)), 8), max(len(logits_TV), 1))
    buffers = row_passes.open_rows(chosen, size, placement.real, like=logits_TV, grad_dtype=dtype)
    for start in range(0, len(logits_TV), size):
        rows = slice(start, min(start + size, len(logits_TV)))
        block_TV = buffers.logits[: rows.stop - rows.start]
        block_TV.copy_(logits_TV[rows, : placement.real])
        if placement.masked_V is not None:
            block_TV.masked_fill_(placement.masked_V, -torch.inf)
        yield rows, buffers
