r"""What one row of a softmax leaves behind: a small state that one pass makes and that merges exactly.

For a row of logits z with temperature tau the state keeps, with u_j = (z_j - max z) / tau,

    max      the largest logit, neither scaled nor shifted
    rest     sum of e^u over every column but one that attains the maximum
    centred  sum of u e^u
    target   the target's logit, -inf in a shard that does not own it

so that, with rest >= 0 and centred <= 0,

    log p(target) = (target - max) / tau - log1p(rest)        entropy = log1p(rest) - centred / (1 + rest)

Neither expression subtracts nearly equal numbers: a token that is almost certain keeps its relative accuracy, where
log Z - E[z] is rounding noise below about 1e-5 nats in fp32. Logits are scaled after the subtraction for the same
reason: an offset common to a row then cancels without error. What remains in fp32 is the rounding of u, which puts the
entropy's relative error below 1e-6 for real vocabularies and below 2e-6 for the smallest ones, down to 1e-8 nats.

A shard without a finite logit has the empty state (-inf, -1, 0, -inf).

Source: the online softmax of Milakov and Gimelshein (arXiv:1805.02867), extended by the centred sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

# e^x of it is 0 in fp32 and in fp64, and 0 times it is 0, where 0 * -inf would be NaN.
LOG_ZERO = -1000.0


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Statistics of the next-token distribution at each position, differentiable in the logits.

    Attributes:
        logprob: Log-probability of the target in nats, ``[T]``, fp32 (fp64 for fp64 logits); ``-inf`` where the
            target's logit is ``-inf`` or its id lies outside the vocabulary.
        entropy: Entropy of the whole distribution in nats, same shape and dtype; never negative.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor


class RowState(NamedTuple):
    """The state of every row of a shard, four tensors ``[T]`` in the statistics' dtype (see the module's text)."""

    max: torch.Tensor
    rest: torch.Tensor
    centred: torch.Tensor
    target: torch.Tensor


def shard_state(logits_TV: torch.Tensor, columns_T: torch.Tensor, temperature_T: torch.Tensor) -> RowState:
    """Reduce a shard of logits to its row state in one pass.

    Args:
        logits_TV: Logits of any floating dtype; ``V`` may be 0.
        columns_T: Column of each row's target in this shard; outside ``[0, V)`` when another shard owns it.
        temperature_T: Temperature of each row; its dtype is the dtype of the statistics.
    """
    empty_T = torch.full_like(temperature_T, -torch.inf)
    if logits_TV.shape[1] == 0:
        return RowState(empty_T, torch.full_like(empty_T, -1.0), torch.zeros_like(empty_T), empty_T)
    top_T, argmax_T = logits_TV.max(dim=-1)
    max_T = top_T.to(temperature_T.dtype)
    max_T = max_T.masked_fill(max_T == torch.inf, torch.nan)  # an infinite logit leaves no distribution
    mass_TV = (scaled_TV := scaled_difference(logits_TV, max_T, temperature_T)).exp()
    rest_T = mass_TV.scatter_(1, argmax_T[:, None], 0.0).sum(dim=-1)
    centred_T = scaled_TV.mul_(mass_TV).sum(dim=-1)
    last = logits_TV.shape[1] - 1
    own_T = (columns_T >= 0) & (columns_T <= last)
    target_T = logits_TV.gather(1, columns_T.clamp(0, last)[:, None]).squeeze(1).to(max_T.dtype)
    return RowState(
        max_T,
        torch.where(max_T == -torch.inf, -1.0, rest_T),
        centred_T,
        torch.where(own_T, target_T, -torch.inf),
    )


def scaled_difference(logits_TV: torch.Tensor, max_T: torch.Tensor, temperature_T: torch.Tensor) -> torch.Tensor:
    """``(z - max) / tau`` as a new ``[T, V]`` tensor in the statistics' dtype, ``-inf`` replaced by ``LOG_ZERO``."""
    finite_max_T = max_T.masked_fill(max_T == -torch.inf, 0.0)
    return (logits_TV - finite_max_T[:, None]).div_(temperature_T[:, None]).clamp_(min=LOG_ZERO)


def merge(a: RowState, b: RowState, temperature_T: torch.Tensor) -> RowState:
    """The state of the rows of ``a`` and ``b`` side by side; merging with an empty state changes nothing."""
    max_T = torch.maximum(a.max, b.max)
    shift_a_T, shift_b_T = _shift(a.max, max_T, temperature_T), _shift(b.max, max_T, temperature_T)
    scale_a_T, scale_b_T = shift_a_T.exp(), shift_b_T.exp()
    sum_a_T, sum_b_T = 1.0 + a.rest, 1.0 + b.rest
    # The side with the smaller maximum loses its claim to the excluded column, so all of its mass joins `rest`.
    rest_T = torch.where(a.max >= b.max, a.rest + scale_b_T * sum_b_T, b.rest + scale_a_T * sum_a_T)
    centred_T = scale_a_T * (a.centred + shift_a_T * sum_a_T) + scale_b_T * (b.centred + shift_b_T * sum_b_T)
    return RowState(max_T, rest_T, centred_T, torch.maximum(a.target, b.target))


def _shift(max_T: torch.Tensor, merged_max_T: torch.Tensor, temperature_T: torch.Tensor) -> torch.Tensor:
    scaled_T = ((max_T - merged_max_T) / temperature_T).clamp(min=LOG_ZERO)
    return torch.where(max_T == merged_max_T, 0.0, scaled_T)


def finish(state: RowState, temperature_T: torch.Tensor) -> TokenStats:
    """Log-probability and entropy of a complete row; a row without any finite logit has a NaN entropy."""
    log_mass_T = state.rest.log1p()
    logprob_T = (state.target - state.max) / temperature_T - log_mass_T
    return TokenStats(
        logprob=torch.where(state.target == -torch.inf, -torch.inf, logprob_T),
        entropy=log_mass_T - state.centred / (1.0 + state.rest),
    )
