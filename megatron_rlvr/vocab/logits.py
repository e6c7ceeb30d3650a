r"""Log-probability and entropy from logits that exist, sharded over the vocabulary or not.

The forward pass reads the shard once and gathers four numbers per token; the backward pass talks to nobody. For
upstream gradients g of the log-probability and h of the entropy (target y, entropy H, temperature tau)

    tau * dz_j = g [j = y] - p_j (g + h (log p_j + H))

Work goes through blocks of rows, so that the temporaries stay small beside the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_rlvr.vocab.state import RowState, TokenStats, finish, merge, scaled_difference, shard_state

_BLOCK_BYTES = 64 * 2**20


def token_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
) -> TokenStats:
    """Log-probability of each target and entropy of each row, in nats, differentiable in ``logits``.

    Statistics are computed in fp32 (fp64 for fp64 logits); the gradient has the dtype of ``logits``. ``-inf`` logits
    are impossible tokens: they carry no mass and receive no gradient, and the log-probability of an impossible target
    is the constant ``-inf``, so it passes none on. With a group of more than one rank the forward
    pass does one all-gather of four numbers per token and merges them in rank order, so every rank holds the same
    bits; the backward pass does no collective and yields the gradient of this rank's shard.

    Args:
        logits: ``[T, V / tp]``, bf16, fp16, fp32 or fp64. Shards have equal width and lie in the group's rank order.
        targets: ``[T]`` global token ids, int64. Ids outside the vocabulary have log-probability ``-inf``; checking
            them here would stall a GPU.
        group: Ranks over which the vocabulary is sharded; ``None`` when ``logits`` is the whole vocabulary.
        temperature: Divides the logits; a positive number, or a tensor ``[T]`` (or 0-d) that receives no gradient.
            Rows whose tensor temperature is not positive become NaN.
        vocab_size: Number of real columns; columns with a global id at or above it are padding, carry no mass and
            receive a zero gradient. ``None`` when there is no padding.

    Raises:
        ValueError: If a shape, dtype, device, temperature or vocabulary size does not fit.
    """
    _check(logits, targets)
    ranks = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    width = logits.shape[1]
    if vocab_size is None:
        vocab_size = width * ranks
    if not 0 < vocab_size <= width * ranks:
        raise ValueError(f"vocab_size must lie in 1..{width * ranks} ({ranks} shards of {width}), got {vocab_size}")
    stats_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    temperature_T = _row_temperature(temperature, logits, stats_dtype)
    columns_T = targets - rank * width
    real = min(max(vocab_size - rank * width, 0), width)
    logprob_T, entropy_T = _TokenStats.apply(  # type: ignore[no-untyped-call]
        logits, columns_T, temperature_T, real, group if ranks > 1 else None
    )
    return TokenStats(logprob=logprob_T, entropy=entropy_T)


def _check(logits: torch.Tensor, targets: torch.Tensor) -> None:
    if logits.ndim != 2 or logits.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"logits must be a floating [T, V/tp] tensor, got {logits.dtype} {list(logits.shape)}")
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets must be int64 [T] with T = {logits.shape[0]} as in logits, "
            f"got {targets.dtype} {list(targets.shape)}"
        )
    if targets.device != logits.device:
        raise ValueError(f"targets are on {targets.device} but logits on {logits.device}")


def _row_temperature(temperature: float | torch.Tensor, logits: torch.Tensor, stats_dtype: torch.dtype) -> torch.Tensor:
    rows = logits.shape[0]
    if not isinstance(temperature, torch.Tensor):
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        return torch.full((rows,), temperature, dtype=stats_dtype, device=logits.device)
    if temperature.shape not in ((), (rows,)):
        raise ValueError(f"temperature must be a number or a tensor [T] with T = {rows}, got {list(temperature.shape)}")
    if temperature.requires_grad:
        raise ValueError("temperature requires a gradient, which token_stats does not give; detach it")
    temperature_T = temperature.to(logits.device, stats_dtype).expand(rows)
    return torch.where(temperature_T > 0, temperature_T, torch.nan)


def _row_blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(128, _BLOCK_BYTES // (8 * max(width, 1)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class _Context(FunctionCtx):
    saved_tensors: tuple[torch.Tensor, ...]
    real: int


class _TokenStats(torch.autograd.Function):
    """The custom gradient behind ``token_stats``; saves the logits and five numbers per token."""

    @staticmethod
    def forward(
        ctx: _Context,
        logits_TV: torch.Tensor,
        columns_T: torch.Tensor,
        temperature_T: torch.Tensor,
        real: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state_T4 = temperature_T.new_empty(logits_TV.shape[0], 4)
        for rows in _row_blocks(*logits_TV.shape):
            state = shard_state(logits_TV[rows, :real], columns_T[rows], temperature_T[rows])
            state_T4[rows] = torch.stack(state, dim=-1)
        whole = _merge_over_ranks(state_T4, temperature_T, group)
        stats = finish(whole, temperature_T)
        # A row without a finite logit has no distribution; with these stand-ins its gradient is 0 rather than NaN.
        void_T = whole.max == -torch.inf
        log_mass_T = whole.rest.log1p().masked_fill(void_T, 0.0)
        entropy_T = stats.entropy.masked_fill(void_T, 0.0)
        ctx.save_for_backward(logits_TV, columns_T, temperature_T, whole.max, log_mass_T, entropy_T, stats.logprob)
        ctx.real = real
        return stats.logprob, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, grad_logprob_T: torch.Tensor, grad_entropy_T: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        logits_TV, columns_T, temperature_T, max_T, log_mass_T, entropy_T, logprob_T = ctx.saved_tensors
        impossible_T = logprob_T == -torch.inf
        grad_logprob_T = grad_logprob_T.masked_fill(impossible_T, 0.0)
        grad_TV = torch.zeros_like(logits_TV) if ctx.real < logits_TV.shape[1] else torch.empty_like(logits_TV)
        real_TV = grad_TV[:, : ctx.real]
        for rows in _row_blocks(*logits_TV.shape):
            logp_TV = scaled_difference(logits_TV[rows, : ctx.real], max_T[rows], temperature_T[rows])
            logp_TV.sub_(log_mass_T[rows, None])
            weight_TV = logp_TV.exp().div_(temperature_T[rows, None]).neg_()
            slope_TV = logp_TV.add_(entropy_T[rows, None]).mul_(grad_entropy_T[rows, None])
            real_TV[rows] = slope_TV.add_(grad_logprob_T[rows, None]).mul_(weight_TV)
        if ctx.real > 0:
            # 1 - p of a token that is almost certain is lost in the subtraction above but not in expm1.
            slope_T = grad_entropy_T * (logprob_T + entropy_T)
            target_T = -(grad_logprob_T * logprob_T.expm1() + slope_T * logprob_T.exp()) / temperature_T
            target_T = target_T.masked_fill(impossible_T, 0.0).to(grad_TV.dtype)
            index_T1 = columns_T.clamp(0, ctx.real - 1)[:, None]
            own_T1 = ((columns_T >= 0) & (columns_T < ctx.real))[:, None]
            real_TV.scatter_(1, index_T1, torch.where(own_T1, target_T[:, None], real_TV.gather(1, index_T1)))
        return grad_TV, None, None, None, None


def _merge_over_ranks(state_T4: torch.Tensor, temperature_T: torch.Tensor, group: dist.ProcessGroup | None) -> RowState:
    if group is None:
        return RowState(*state_T4.unbind(dim=-1))
    gathered = [torch.empty_like(state_T4) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, state_T4, group=group)
    shards = [RowState(*shard_T4.unbind(dim=-1)) for shard_T4 in gathered]
    return functools.reduce(lambda a, b: merge(a, b, temperature_T), shards)
