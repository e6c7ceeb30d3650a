r"""A loss of hidden states in one sweep over the tokens: the gradient is formed while a chunk's logits still exist.

Where the loss is a sum of one term for each token, the derivatives of the term in that token's log-probability and
entropy are known as soon as the chunk's statistics are. Logits, hidden gradient and weight gradient then cost one GEMM
each, three in all, exactly, where recomputation costs four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_rlvr.vocab.head import Head, HeadCall, check_call, enter, leave
from megatron_rlvr.vocab.linear import stats_of
from megatron_rlvr.vocab.nucleus import finish_nucleus
from megatron_rlvr.vocab.rows import Backend, stats_dtype
from megatron_rlvr.vocab.shards import over_ranks
from megatron_rlvr.vocab.state import TokenStats, finish, totals

TokenLoss = Callable[[TokenStats, slice], torch.Tensor]


@dataclass(frozen=True, slots=True)
class SweepOutput:
    """What a sweep leaves.

    Attributes:
        loss: Sum of the token losses, 0-d, differentiable in ``hidden`` and ``weight``.
        logprob: Log-probability of each target, ``[R]``, without gradient.
        entropy: Entropy of each row, ``[R]``, without gradient.
    """

    loss: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_loss: TokenLoss,
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
    separable: bool = True,
    main_grad: bool = False,
) -> SweepOutput:
    """The sum of ``token_loss`` over the tokens, from hidden states, in one sweep.

    The gradient is computed here, in the forward pass, if anything needs it; the backward pass only scales it by the
    upstream gradient. Tokens that pass no gradient on (clipped, or without advantage) take part in the first GEMM only.
    Under tensor parallelism each chunk gathers its row states once, and the hidden gradient is reduced once.

    Args:
        hidden: As for `linear_token_stats`.
        weight: As for `linear_token_stats`.
        targets: As for `linear_token_stats`.
        token_loss: Called with the statistics of consecutive rows (tensors ``[t]``, differentiable) and their slice of
            ``[0, R)``; returns the loss of each, ``[t]``. It is called once for each chunk, so it must not depend on
            how the rows are cut: a mean or a rank over its tokens would.
        rows: As for `linear_token_stats`.
        group: As for `linear_token_stats`.
        temperature: As for `linear_token_stats`.
        vocab_size: As for `linear_token_stats`.
        shard: As for `linear_token_stats`.
        sequence_parallel: As for `linear_token_stats`.
        extras: Whether ``token_loss`` receives `TokenExtras`.
        nucleus: Mass of the nucleus whose entropy ``token_loss`` receives, in (0, 1], or ``None`` for none. With more
            than one rank, every chunk adds three all-reduces of ``[t, 2050]`` (six for fp64; none for 1) and one
            all-gather. The chunk's buffers double.
        backend: As for `linear_token_stats`.
        chunk_rows: As for `linear_token_stats`.
        separable: False for a loss in which tokens depend on one another, such as a sequence's ratio:
            ``token_loss`` then receives all R tokens at once, and the gradient takes a second pass.
        main_grad: Add the weight's gradient to ``weight.main_grad`` (fp32) as Megatron-Core's fused layers do, and pass
            autograd a placeholder. The sweep does not know the upstream gradient, which therefore has to be exactly 1.

    Raises:
        ValueError: If an argument does not fit, or ``token_loss`` does not return one loss for each row.
        RuntimeError: In the backward pass, if ``main_grad`` is set and the upstream gradient is not 1.
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
    if main_grad:
        _check_main_grad(weight, separable)
    if separable:
        loss, logprob_R, entropy_R = _Sweep.apply(  # type: ignore[no-untyped-call]
            hidden, weight, call, token_loss, torch.is_grad_enabled(), main_grad
        )
        return SweepOutput(loss, logprob_R, entropy_R)
    stats = stats_of(hidden, weight, call)
    losses_R = token_loss(stats, slice(0, len(targets)))
    _check_losses(losses_R, len(targets))
    return SweepOutput(losses_R.sum(), stats.logprob.detach(), stats.entropy.detach())


def _check_main_grad(weight: torch.Tensor, separable: bool) -> None:
    accumulator = getattr(weight, "main_grad", None)
    if not separable:
        raise ValueError(
            "main_grad=True goes with separable=True only; the second pass returns its gradient to autograd"
        )
    if accumulator is None or accumulator.dtype != stats_dtype(weight) or accumulator.shape != weight.shape:
        raise ValueError(
            f"main_grad=True needs weight.main_grad, {stats_dtype(weight)} {[*weight.shape]}, as Megatron-Core's "
            "DistributedDataParallel with grad_reduce_in_fp32=True makes it; give main_grad=False"
        )


def _check_losses(losses_R: torch.Tensor, count: int) -> None:
    if losses_R.shape != (count,):
        raise ValueError(
            f"token_loss returned {[*losses_R.shape]} for {count} rows; it must return one loss for each row and leave "
            "the sum, and any division by a count of tokens, to its caller"
        )


@dataclass(frozen=True, slots=True)
class _Sinks:
    """Where gradients go; ``None`` where nobody wants them."""

    hidden_RH: torch.Tensor | None
    weight_VH: torch.Tensor | None

    def add(self, head: Head, grad_RV: torch.Tensor, entered_RH: torch.Tensor, rows: slice | torch.Tensor) -> None:
        """Add the gradients of the hidden states with the indices ``rows``, given that of their logits."""
        if self.hidden_RH is not None:
            self.hidden_RH[rows] = head.hidden_gradient(grad_RV).to(self.hidden_RH.dtype)
        if self.weight_VH is not None:
            head.add_weight_gradient(self.weight_VH, grad_RV, entered_RH[rows])


class _Context(FunctionCtx):
    needs_input_grad: tuple[bool, ...]
    gradients: tuple[torch.Tensor | None, torch.Tensor | None] | None
    weight_VH: torch.Tensor
    main_grad: bool


class _Sweep(torch.autograd.Function):
    """Loss and gradients in the forward pass; keeps the gradients for the backward pass."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        call: HeadCall,
        token_loss: TokenLoss,
        grad_enabled: bool,
        main_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        entered_RH, head = enter(hidden_TH, call), Head(weight_VH, call)
        sinks = _sinks(ctx, entered_RH, weight_VH, grad_enabled, main_grad)
        stats_2R = call.temperature_R.new_empty(2, len(entered_RH))
        loss = call.temperature_R.new_zeros(())
        for chunk in head.slices:
            columns_R, temperature_R = call.columns_R[chunk], call.temperature_R[chunk]
            head.fill(entered_RH[chunk])
            state_RK = head.rows.state(columns_R, temperature_R, extras=call.extras)
            state = over_ranks(state_RK, temperature_R, call.group)
            stats, nucleus = finish(state, temperature_R), None
            if head.nucleus is not None:
                lowest_R, cut_RK = head.nucleus.state(state.max, columns_R, temperature_R)
                nucleus_entropy_R, nucleus = finish_nucleus(cut_RK, lowest_R, columns_R, temperature_R, call.group)
                stats = replace(stats, nucleus_entropy=nucleus_entropy_R)
            stats_2R[0, chunk], stats_2R[1, chunk] = stats.logprob, stats.entropy
            chunk_loss, grads_R = _slopes(stats, chunk, token_loss)
            loss += chunk_loss
            if sinks.hidden_RH is None and sinks.weight_VH is None:
                continue
            active_R = torch.stack(grads_R).any(0).nonzero().squeeze(1)
            if len(active_R) == 0:
                continue
            part = None if len(active_R) == len(columns_R) else active_R
            row_totals = totals(state, stats, columns_R, temperature_R)
            grad_RV = head.rows.gradient(row_totals, grads_R[0], grads_R[1], part)
            if head.nucleus is not None and nucleus is not None:
                grad_RV.add_(head.nucleus.gradient(nucleus, grads_R[2], part))
            sinks.add(head, grad_RV, entered_RH, chunk if part is None else part + chunk.start)
        grad_TH = None if sinks.hidden_RH is None else leave(sinks.hidden_RH, hidden_TH, call)
        grad_VH = None if sinks.weight_VH is None or main_grad else sinks.weight_VH.to(weight_VH.dtype)
        ctx.gradients, ctx.weight_VH, ctx.main_grad = (grad_TH, grad_VH), weight_VH, main_grad
        ctx.mark_non_differentiable(*stats_2R)
        return loss, *stats_2R

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, grad_loss: torch.Tensor, *_: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this sweep was handed out already; call linear_policy_loss again")
        grad_TH, grad_VH = ctx.gradients
        ctx.gradients = None
        if ctx.main_grad:
            grad_VH = _placeholder(ctx.weight_VH, grad_loss)
        elif grad_VH is not None:
            grad_VH.mul_(grad_loss)
        return None if grad_TH is None else grad_TH.mul_(grad_loss), grad_VH, None, None, None, None


def _sinks(
    ctx: _Context, entered_RH: torch.Tensor, weight_VH: torch.Tensor, grad_enabled: bool, main_grad: bool
) -> _Sinks:
    wants_hidden, wants_weight = (grad_enabled and needs for needs in ctx.needs_input_grad[:2])
    weight_sink_VH: torch.Tensor | None = None
    if wants_weight:
        dtype = stats_dtype(weight_VH)
        weight_sink_VH = weight_VH.main_grad if main_grad else torch.zeros_like(weight_VH, dtype=dtype)  # type: ignore[attr-defined]
    return _Sinks(torch.zeros_like(entered_RH) if wants_hidden else None, weight_sink_VH)


def _slopes(stats: TokenStats, chunk: slice, token_loss: TokenLoss) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Sum of a chunk's losses, and its derivatives in `TokenStats.differentiable`."""
    with torch.enable_grad():
        leaves = tuple(values_R.detach().requires_grad_() for values_R in stats.differentiable())
        logprob_R, entropy_R, *nucleus = leaves
        losses_R = token_loss(TokenStats(logprob_R, entropy_R, stats.extras, *nucleus), chunk)
        _check_losses(losses_R, len(logprob_R))
        total = losses_R.sum()
        slopes: tuple[torch.Tensor | None, ...] = (None,) * len(leaves)
        if total.requires_grad:
            slopes = torch.autograd.grad(total, leaves, allow_unused=True)
    grad_logprob_R, *others = (torch.zeros_like(logprob_R) if slope is None else slope for slope in slopes)
    return total.detach(), (grad_logprob_R.masked_fill(logprob_R == -torch.inf, 0.0), *others)


def _placeholder(weight_VH: torch.Tensor, grad_loss: torch.Tensor) -> torch.Tensor | None:
    """What autograd gets where the gradient is in ``main_grad`` already, as Megatron-Core's hooks expect it."""
    torch._assert_async(
        grad_loss == 1.0,
        "linear_policy_loss(main_grad=True) got an upstream gradient other than 1, but has added the weight's gradient "
        "already; scale inside token_loss, or give main_grad=False",
    )
    if not hasattr(weight_VH, "grad_added_to_main_grad"):
        return None
    weight_VH.grad_added_to_main_grad = True
    # A weight that is also the embedding gets another gradient through autograd, to which this one is added.
    return torch.zeros_like(weight_VH) if getattr(weight_VH, "zero_out_wgrad", False) else torch.empty_like(weight_VH)
