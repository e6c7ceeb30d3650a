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

Four more sums, on request, give the quantities of `TokenExtras`: sum of u^2 e^u, and sums of e^2u (without the column
that ``rest`` leaves out), u e^2u and u^2 e^2u.

A shard without a finite logit has the empty state (-inf, -1, 0, -inf; 0, -1, 0, 0).

Source: the online softmax of Milakov and Gimelshein (arXiv:1805.02867), extended by the centred sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

# e^x of it is 0 in fp32 and in fp64, and 0 times it is 0, where 0 * -inf would be NaN.
LOG_ZERO = -1000.0
BASE, EXTENDED = 4, 8


@dataclass(frozen=True, slots=True)
class TokenExtras:
    """Further statistics of each position's distribution, each ``[T]``, without gradients.

    Attributes:
        max_prob: Largest probability.
        collision: Sum of squared probabilities, e^(-Renyi-2 entropy).
        varentropy: Variance of ``-log p`` under ``p``, nats squared.
        logprob_grad_norm: 2-norm of the gradient of log p(target) in the scaled logits z / tau; 0 for an impossible
            target.
        entropy_grad_norm: 2-norm of the gradient of the entropy in the scaled logits.
        entropy_slope: Inner product of the two gradients, the predictor of entropy change: a step of the scaled logits
            along the gradient of ``A log p(target)`` with rate eta changes the entropy by ``eta A entropy_slope`` to
            first order. 0 for an impossible target.
    """

    max_prob: torch.Tensor
    collision: torch.Tensor
    varentropy: torch.Tensor
    logprob_grad_norm: torch.Tensor
    entropy_grad_norm: torch.Tensor
    entropy_slope: torch.Tensor


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Statistics of the next-token distribution at each position, differentiable in the logits.

    Attributes:
        logprob: Log-probability of the target in nats, ``[T]``, fp32 (fp64 for fp64 logits); ``-inf`` where the
            target's logit is ``-inf`` or its id lies outside the vocabulary.
        entropy: Entropy of the whole distribution in nats, same shape and dtype; never negative.
        extras: Further statistics where they were asked for, else ``None``.
        nucleus_entropy: Entropy in nats of the distribution cut down to its nucleus and renormalised, same shape and
            dtype as ``entropy``, where it was asked for, else ``None``; its gradient holds the nucleus fixed.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    extras: TokenExtras | None = None
    nucleus_entropy: torch.Tensor | None = None

    def flat(self) -> tuple[torch.Tensor, ...]:
        """Its tensors in one tuple, as an autograd function has to return them: differentiable ones come first."""
        return *self.differentiable(), *self.constant()

    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """Log-probability, entropy and, where there is one, nucleus entropy."""
        nucleus = () if self.nucleus_entropy is None else (self.nucleus_entropy,)
        return self.logprob, self.entropy, *nucleus

    def constant(self) -> tuple[torch.Tensor, ...]:
        """The tensors without gradients."""
        return () if self.extras is None else tuple(getattr(self.extras, name) for name in TokenExtras.__slots__)

    @classmethod
    def of(cls, values: tuple[torch.Tensor, ...], *, nucleus: bool) -> TokenStats:
        """The statistics whose `flat` is ``values``; ``nucleus`` says whether the nucleus entropy is among them."""
        logprob, entropy, *more = values
        nucleus_entropy = more.pop(0) if nucleus else None
        return cls(logprob, entropy, TokenExtras(*more) if more else None, nucleus_entropy)


class Moments(NamedTuple):
    """The four sums on request, each ``[T]``; see the module's text."""

    second: torch.Tensor
    square_rest: torch.Tensor
    square_centred: torch.Tensor
    square_second: torch.Tensor


class RowState(NamedTuple):
    """The state of every row of a shard, tensors ``[T]`` in the statistics' dtype (see the module's text)."""

    max: torch.Tensor
    rest: torch.Tensor
    centred: torch.Tensor
    target: torch.Tensor
    moments: Moments | None = None


class Totals(NamedTuple):
    """What the gradient of a row needs besides its logits, each ``[T]``.

    ``columns`` is the target's column in this shard, outside it where another shard owns it. ``max``, ``log_mass``,
    ``entropy`` and ``logprob`` belong to the whole row, over all shards; a row without a distribution holds 0 for the
    second and third, so that its gradient is 0 rather than NaN.
    """

    columns: torch.Tensor
    temperature: torch.Tensor
    max: torch.Tensor
    log_mass: torch.Tensor
    entropy: torch.Tensor
    logprob: torch.Tensor

    def select(self, rows: slice | torch.Tensor) -> Totals:
        """The same for some of the rows."""
        return Totals(*(value[rows] for value in self))


def unpack(state_TK: torch.Tensor) -> RowState:
    """The row state whose fields are the columns of ``state_TK``, ``[T, 4]`` or, with moments, ``[T, 8]``."""
    top_T, rest_T, centred_T, target_T, *more = state_TK.unbind(dim=-1)
    return RowState(top_T, rest_T, centred_T, target_T, Moments(*more) if more else None)


def merge(a: RowState, b: RowState, temperature_T: torch.Tensor) -> RowState:
    """The state of the rows of ``a`` and ``b`` side by side; merging with an empty state changes nothing."""
    max_T = torch.maximum(a.max, b.max)
    shift_a_T, shift_b_T = shift(a.max, max_T, temperature_T), shift(b.max, max_T, temperature_T)
    scale_a_T, scale_b_T = shift_a_T.exp(), shift_b_T.exp()
    sum_a_T, sum_b_T = 1.0 + a.rest, 1.0 + b.rest
    # The side with the smaller maximum loses its claim to the excluded column, so all of its mass joins `rest`.
    a_wins_T = a.max >= b.max
    rest_T = torch.where(a_wins_T, a.rest + scale_b_T * sum_b_T, b.rest + scale_a_T * sum_a_T)
    centred_T = scale_a_T * (a.centred + shift_a_T * sum_a_T) + scale_b_T * (b.centred + shift_b_T * sum_b_T)
    moments = None
    if a.moments is not None and b.moments is not None:
        moved_a = _moved(a.moments, a, shift_a_T, scale_a_T)
        moved_b = _moved(b.moments, b, shift_b_T, scale_b_T)
        square_rest_T = torch.where(
            a_wins_T, a.moments.square_rest + moved_b.square_rest, b.moments.square_rest + moved_a.square_rest
        )
        moments = Moments(*map(torch.add, moved_a, moved_b))._replace(square_rest=square_rest_T)
    return RowState(max_T, rest_T, centred_T, torch.maximum(a.target, b.target), moments)


def _moved(moments: Moments, state: RowState, shift_T: torch.Tensor, scale_T: torch.Tensor) -> Moments:
    """The sums about a maximum that lies ``-shift`` higher; the one of e^2u now over every column."""
    sum_T, square_T = 1.0 + state.rest, 1.0 + moments.square_rest
    scale_squared_T = scale_T.square()
    return Moments(
        scale_T * (moments.second + shift_T * (2.0 * state.centred + shift_T * sum_T)),
        scale_squared_T * square_T,
        scale_squared_T * (moments.square_centred + shift_T * square_T),
        scale_squared_T * (moments.square_second + shift_T * (2.0 * moments.square_centred + shift_T * square_T)),
    )


def shift(max_T: torch.Tensor, whole_max_T: torch.Tensor, temperature_T: torch.Tensor) -> torch.Tensor:
    """``(max - whole max) / tau``, at most 0; an empty shard gives `LOG_ZERO`, an empty row 0."""
    scaled_T = ((max_T - whole_max_T) / temperature_T).clamp(min=LOG_ZERO)
    return torch.where(max_T == whole_max_T, 0.0, scaled_T)


def finish(state: RowState, temperature_T: torch.Tensor) -> TokenStats:
    """Statistics of a complete row; a row without any finite logit has a NaN entropy."""
    log_mass_T = state.rest.log1p()
    logprob_T = (state.target - state.max) / temperature_T - log_mass_T
    logprob_T = torch.where(state.target == -torch.inf, -torch.inf, logprob_T)
    entropy_T = log_mass_T - state.centred / (1.0 + state.rest)
    extras = None if state.moments is None else _extras(state, state.moments, log_mass_T, logprob_T)
    return TokenStats(logprob_T, entropy_T, extras)


def _extras(state: RowState, moments: Moments, log_mass_T: torch.Tensor, logprob_T: torch.Tensor) -> TokenExtras:
    r"""Norms and inner products of the two gradients, each as a sum without cancellation where p(target) -> 1.

    With S = 1 + rest, m the mean of u (centred / S) and C, D, E the sums of e^2u, u e^2u, u^2 e^2u without the excluded
    column: grad log p = e_y - p, grad H = -p (log p + H) = -p (u - m), hence

        |grad log p|^2 = 1 - 2 p_y + sum p^2            = (rest^2 + C) / S^2 where the target is the excluded column
        |grad H|^2     = sum p^2 (u - m)^2              = (m^2 + E - 2 m D + m^2 C) / S^2
        inner product  = sum p^2 (u - m) - p_y (u_y - m)
    """
    sum_T = 1.0 + state.rest
    mean_T, squared_T = state.centred / sum_T, sum_T.square()
    collision_T = (1.0 + moments.square_rest) / squared_T
    target_prob_T = logprob_T.exp()
    possible_T = logprob_T != -torch.inf
    # With a tied maximum the excluded column may be another one, but then p(target) <= 1/2 and nothing cancels.
    certain_T = (state.target == state.max) & (state.rest < 1.0)
    norm_T = torch.where(
        certain_T,
        (state.rest.square() + moments.square_rest) / squared_T,
        1.0 - 2.0 * target_prob_T + collision_T,
    )
    tail_T = (moments.square_centred - mean_T * moments.square_rest) / squared_T
    # The excluded column has u = 0: p^2 (-m) - p (-m) = p m (1 - p) with 1 - p = rest / S.
    slope_T = torch.where(
        certain_T,
        mean_T * state.rest / squared_T + tail_T,
        tail_T - mean_T / squared_T - target_prob_T * (logprob_T + log_mass_T - mean_T),
    )
    entropy_norm_T = mean_T.square() * (1.0 + moments.square_rest)
    entropy_norm_T = entropy_norm_T + moments.square_second - 2.0 * mean_T * moments.square_centred
    return TokenExtras(
        max_prob=sum_T.reciprocal(),
        collision=collision_T,
        varentropy=(moments.second / sum_T - mean_T.square()).clamp(min=0.0),
        logprob_grad_norm=torch.where(possible_T, norm_T.clamp(min=0.0).sqrt(), 0.0),
        entropy_grad_norm=entropy_norm_T.clamp(min=0.0).div(squared_T).sqrt(),
        entropy_slope=torch.where(possible_T, slope_T, 0.0),
    )


def totals(state: RowState, stats: TokenStats, columns_T: torch.Tensor, temperature_T: torch.Tensor) -> Totals:
    """What the gradient needs of complete rows."""
    void_T = state.max == -torch.inf
    return Totals(
        columns_T,
        temperature_T,
        state.max,
        state.rest.log1p().masked_fill(void_T, 0.0),
        stats.entropy.masked_fill(void_T, 0.0),
        stats.logprob,
    )
