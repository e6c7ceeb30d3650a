"""Log-probability and entropy from hidden states, in two passes: the logits never exist beyond a chunk.

The forward pass keeps a handful of numbers per token, the backward pass makes each chunk's logits again. That is four
GEMMs' worth of work where `vocab.sweep` needs three, for which the outputs may go into any function of all tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_rlvr.vocab.head import Head, HeadCall, check_call, enter, leave
from megatron_rlvr.vocab.nucleus import Nucleus, finish_nucleus
from megatron_rlvr.vocab.rows import Backend, stats_dtype
from megatron_rlvr.vocab.shards import over_ranks
from megatron_rlvr.vocab.state import BASE, EXTENDED, TokenStats, Totals, finish, totals


def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
    shard: range | torch.Tensor | None = None,
    sequence_parallel: bool = False,
    extras: bool = False,
    nucleus: float | None = None,
    backend: Backend = "auto",
    chunk_rows: int | None = None,
) -> TokenStats:
    """`token_stats` of the logits ``hidden @ weight.T``, differentiable in ``hidden`` and ``weight``.

    With a group of more than one rank the forward pass does one all-gather of the row states. The gradient of
    ``hidden`` is complete on every rank: the backward pass sums it over the group (or, with ``sequence_parallel``,
    scatters the sum), as every column-parallel layer must; the statistics need no collective there. Tokens whose
    upstream gradients are all 0 take no part in the backward pass.

    Args:
        hidden: ``[T, H]``, bf16, fp16, fp32 or fp64, the same on every rank of the group; with ``sequence_parallel``
            this rank's ``[T / tp, H]``.
        weight: ``[V / tp, H]``, of the same dtype.
        targets: ``[R]`` global token ids of the rows that enter the head, int64.
        rows: ``[R]`` distinct indices into the T hidden states, int64; ``None`` for all of them in order.
        group: Ranks over which the vocabulary is sharded.
        temperature: As for `token_stats`, a number or ``[R]``.
        vocab_size: As for `token_stats`.
        shard: As for `token_stats`, about the rows of ``weight``.
        sequence_parallel: Whether ``hidden`` is split over ``group`` along T.
        extras: As for `token_stats`.
        nucleus: As for `token_stats`. With more than one rank, every chunk of tokens adds one all-gather of its row
            states and three all-reduces of ``[t, 2050]`` (six for fp64; none for 1), and the forward pass one more
            all-gather. The chunk's buffers double.
        backend: As for `token_stats`.
        chunk_rows: Tokens whose logits exist at a time; ``None`` picks a size that suits the vocabulary.

    Raises:
        ValueError: If a shape, dtype, device, temperature or size does not fit.
    """
    call = check_call(
        hidden,
        weight,
        targets,
        rows=rows,
        group=group,
        temperature=temperature,
        vocab_size=vocab_size,
        shard=shard,
        sequence_parallel=sequence_parallel,
        extras=extras,
        nucleus=nucleus,
        backend=backend,
        chunk_rows=chunk_rows,
    )
    return stats_of(hidden, weight, call)


def stats_of(hidden: torch.Tensor, weight: torch.Tensor, call: HeadCall) -> TokenStats:
    """`linear_token_stats` with its other arguments checked already."""
    outputs = _LinearStats.apply(hidden, weight, call)  # type: ignore[no-untyped-call]
    return TokenStats.of(outputs, nucleus=call.nucleus is not None)


class _Context(FunctionCtx):
    saved_tensors: tuple[torch.Tensor, ...]
    call: HeadCall


class _LinearStats(torch.autograd.Function):
    """The custom gradient behind ``linear_token_stats``; saves its inputs and 6 (with a nucleus 13) numbers a token."""

    @staticmethod
    def forward(
        ctx: _Context, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, call: HeadCall
    ) -> tuple[torch.Tensor, ...]:
        entered_RH, head = enter(hidden_TH, call), Head(weight_VH, call)
        state_RK = call.temperature_R.new_empty(len(entered_RH), EXTENDED if call.extras else BASE)
        lowest_R, cut_RK = state_RK.new_empty(len(state_RK)), state_RK.new_empty(len(state_RK), BASE)
        for chunk in head.slices:
            columns_R, temperature_R = call.columns_R[chunk], call.temperature_R[chunk]
            head.fill(entered_RH[chunk])
            state_RK[chunk] = head.rows.state(columns_R, temperature_R, extras=call.extras)
            if head.nucleus is not None:
                max_R = over_ranks(state_RK[chunk], temperature_R, call.group).max
                lowest_R[chunk], cut_RK[chunk] = head.nucleus.state(max_R, columns_R, temperature_R)
        state = over_ranks(state_RK, call.temperature_R, call.group)
        stats = finish(state, call.temperature_R)
        saved: tuple[torch.Tensor, ...] = totals(state, stats, call.columns_R, call.temperature_R)
        if head.nucleus is not None:
            nucleus_entropy_R, nucleus = finish_nucleus(
                cut_RK, lowest_R, call.columns_R, call.temperature_R, call.group
            )
            stats = replace(stats, nucleus_entropy=nucleus_entropy_R)
            saved = (*saved, *nucleus.flat())
        ctx.save_for_backward(hidden_TH, weight_VH, *saved)
        ctx.call = call
        ctx.mark_non_differentiable(*stats.constant())
        return stats.flat()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, grad_logprob_R: torch.Tensor, grad_entropy_R: torch.Tensor, *more: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_TH, weight_VH, *saved = ctx.saved_tensors
        row_totals, call = Totals(*saved[:6]), ctx.call
        nucleus = None if call.nucleus is None else Nucleus.of(saved[6:])
        grad_logprob_R = grad_logprob_R.masked_fill(row_totals.logprob == -torch.inf, 0.0)
        grads_R = (grad_logprob_R, grad_entropy_R, *more[: nucleus is not None])
        active_R = torch.stack(grads_R).any(0).nonzero().squeeze(1)
        entered_RH, head = enter(hidden_TH, call), Head(weight_VH, call)
        grad_RH = torch.zeros_like(entered_RH)
        grad_VH = torch.zeros_like(weight_VH, dtype=stats_dtype(weight_VH))
        step = max(1, head.slices[0].stop)
        for start in range(0, len(active_R), step):
            some_R = active_R[start : start + step]
            chunk_RH, chunk_totals = entered_RH[some_R], row_totals.select(some_R)
            head.fill(chunk_RH)
            head.rows.recall(chunk_totals.max, chunk_totals.temperature)
            grad_RV = head.rows.gradient(chunk_totals, grad_logprob_R[some_R], grad_entropy_R[some_R])
            if head.nucleus is not None and nucleus is not None:
                chunk_nucleus = nucleus.select(some_R)
                head.nucleus.recall(chunk_nucleus)
                grad_RV.add_(head.nucleus.gradient(chunk_nucleus, more[0][some_R]))
            grad_RH[some_R] = head.hidden_gradient(grad_RV).to(grad_RH.dtype)
            head.add_weight_gradient(grad_VH, grad_RV, chunk_RH)
        return leave(grad_RH, hidden_TH, call), grad_VH.to(weight_VH.dtype), None
