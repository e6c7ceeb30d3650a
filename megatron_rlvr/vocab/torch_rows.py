"""The row passes over a chunk of logits in plain torch: statistics, then the gradient from what they left behind.

Both passes work in place in two buffers of the chunk's size, and ``exp`` is taken once.
"""

from __future__ import annotations

import torch

from megatron_rlvr.vocab.state import BASE, EXTENDED, LOG_ZERO, Totals, shift

_TILE = 2048


class TorchRows:
    """Two ``[rows, V]`` buffers of the statistics' dtype; ``logits`` is the one that the caller fills."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the buffers for chunks of up to ``rows`` rows."""
        self.logits = torch.empty(rows, width, dtype=dtype, device=device)
        self._mass = torch.empty_like(self.logits)
        self._max_T = self.logits.new_empty(0)

    def state(self, columns_T: torch.Tensor, temperature_T: torch.Tensor, *, extras: bool) -> torch.Tensor:
        """State of the first ``len(columns_T)`` rows of ``logits``, ``[T, 4]`` or ``[T, 8]``; see `vocab.state`."""
        logits_TV = self.logits[: len(columns_T)]
        state_TK = temperature_T.new_zeros(len(columns_T), EXTENDED if extras else BASE)
        state_TK[:, (0, 3)] = -torch.inf
        self._max_T = state_TK[:, 0]
        if logits_TV.shape[1] == 0 or len(columns_T) == 0:
            state_TK[:, 1] = -1.0
            state_TK[:, 5:6] = -1.0
            return state_TK
        max_T, argmax_T = logits_TV.max(dim=-1)
        max_T = max_T.masked_fill(max_T == torch.inf, torch.nan)  # an infinite logit leaves no distribution
        last = logits_TV.shape[1] - 1
        own_T = (columns_T >= 0) & (columns_T <= last)
        target_T = logits_TV.gather(1, columns_T.clamp(0, last)[:, None]).squeeze(1)
        state_TK[:, 0] = max_T
        state_TK[:, 3] = torch.where(own_T, target_T, -torch.inf)
        self.recall(max_T, temperature_T)
        self._sums(state_TK, argmax_T[:, None], max_T == -torch.inf)
        return state_TK

    def recall(self, max_T: torch.Tensor, temperature_T: torch.Tensor) -> None:
        """Turn ``logits`` into u = (z - max) / tau and the other buffer into e^u, for any maximum known by now."""
        self._max_T = max_T
        scaled_TV = self.logits[: len(max_T)]
        scaled_TV.sub_(max_T.masked_fill(max_T == -torch.inf, 0.0)[:, None])
        if not bool((temperature_T == 1.0).all()):
            scaled_TV.div_(temperature_T[:, None])
        scaled_TV.clamp_(min=LOG_ZERO)
        torch.exp(scaled_TV, out=self._mass[: len(max_T)])

    def _sums(self, state_TK: torch.Tensor, argmax_T1: torch.Tensor, void_T: torch.Tensor) -> None:
        scaled_TV, mass_TV = self.logits[: len(state_TK)], self._mass[: len(state_TK)]
        top_T1 = mass_TV.gather(1, argmax_T1)
        mass_TV.scatter_(1, argmax_T1, 0.0)
        state_TK[:, 1] = torch.where(void_T, -1.0, mass_TV.sum(dim=-1))
        extras = state_TK.shape[1] == EXTENDED
        # Products go through a narrow tile: a third buffer would cost memory, a batched dot product accuracy.
        for start in range(0, mass_TV.shape[1], _TILE):
            scaled_Tv, mass_Tv = scaled_TV[:, start : start + _TILE], mass_TV[:, start : start + _TILE]
            product_Tv = scaled_Tv * mass_Tv
            state_TK[:, 2] += product_Tv.sum(dim=-1)
            if extras:
                state_TK[:, 5] += (mass_Tv * mass_Tv).sum(dim=-1)
                state_TK[:, 6] += (product_Tv * mass_Tv).sum(dim=-1)
                state_TK[:, 7] += (product_Tv * product_Tv).sum(dim=-1)
                state_TK[:, 4] += product_Tv.mul_(scaled_Tv).sum(dim=-1)
        if extras:
            state_TK[:, 5] = torch.where(void_T, -1.0, state_TK[:, 5])
        mass_TV.scatter_(1, argmax_T1, top_T1)

    def gradient(
        self,
        totals: Totals,
        grad_logprob_T: torch.Tensor,
        grad_entropy_T: torch.Tensor,
        active: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gradient in the raw logits of the rows that `state` or `recall` saw last, which are used up.

        Args:
            totals: Of the same rows, complete over all shards.
            grad_logprob_T: Upstream gradient of each log-probability; 0 where the target is impossible.
            grad_entropy_T: Upstream gradient of each entropy.
            active: Indices of the rows wanted; ``None`` for all.

        Returns:
            ``[T, V]`` in the statistics' dtype, a view of a buffer that the next chunk overwrites.
        """
        scaled_TV, mass_TV, max_T = self.logits[: len(totals.max)], self._mass[: len(totals.max)], self._max_T
        if active is not None:
            scaled_TV, mass_TV, max_T, totals = scaled_TV[active], mass_TV[active], max_T[active], totals.select(active)
            grad_logprob_T, grad_entropy_T = grad_logprob_T[active], grad_entropy_T[active]
        offset_T = shift(max_T, totals.max, totals.temperature) - totals.log_mass
        scale_T = offset_T.exp().div_(totals.temperature).neg_()
        if scaled_TV.device.type == "cpu" and not grad_entropy_T.any():
            grad_TV = mass_TV.mul_((grad_logprob_T * scale_T)[:, None])
        else:
            base_T = grad_logprob_T + grad_entropy_T * (offset_T + totals.entropy)
            grad_TV = scaled_TV.mul_(grad_entropy_T[:, None]).add_(base_T[:, None])
            grad_TV.mul_(mass_TV).mul_(scale_T[:, None])
        if grad_TV.shape[1] > 0:
            _write_targets(grad_TV, totals, grad_logprob_T, grad_entropy_T)
        return grad_TV


def _write_targets(
    grad_TV: torch.Tensor, totals: Totals, grad_logprob_T: torch.Tensor, grad_entropy_T: torch.Tensor
) -> None:
    # 1 - p of a token that is almost certain is lost in a subtraction but not in expm1.
    logprob_T = totals.logprob
    slope_T = grad_entropy_T * (logprob_T + totals.entropy)
    target_T = -(grad_logprob_T * logprob_T.expm1() + slope_T * logprob_T.exp()) / totals.temperature
    target_T = target_T.masked_fill(logprob_T == -torch.inf, 0.0)
    index_T1 = totals.columns.clamp(0, grad_TV.shape[1] - 1)[:, None]
    own_T1 = ((totals.columns >= 0) & (totals.columns < grad_TV.shape[1]))[:, None]
    grad_TV.scatter_(1, index_T1, torch.where(own_T1, target_T[:, None], grad_TV.gather(1, index_T1)))
