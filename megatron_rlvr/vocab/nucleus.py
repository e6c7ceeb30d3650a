r"""The nucleus of a row: its most probable tokens, as few as hold a given share of the mass, and all ties with them.

With S the nucleus and q = p / p(S) on it, the nucleus entropy and its gradient in the scaled logits, S held fixed, are

    N = -sum over S of q log q        dN_j = -q_j (log q_j + N) on S, 0 elsewhere

This is the entropy of the row whose logits outside S are -inf. So the row passes are the ordinary ones over a copy of
the logits that is cut down to S, and what remains to be found is the lowest logit in S. Floats sort as the integers
with their bits do, up to a flip of the negative ones; the lowest logit is therefore found digit by digit, from the mass
that each value of the next digit holds over all shards. The search is exact, takes as many rounds for any logits, and
never waits for the device.

Source: top-p sampling (Holtzman et al., arXiv:1904.09751); the entropy is the one that SIREN (arXiv:2509.25133) trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_rlvr.vocab.rows import Rows
from megatron_rlvr.vocab.shards import over_ranks
from megatron_rlvr.vocab.state import Totals, finish, totals

Blocks = Callable[[], Iterable[tuple[slice, torch.Tensor]]]

_DIGIT_BITS = 11
_DIGITS = 2**_DIGIT_BITS
# Temporaries of the search take some 40 bytes for each logit of a block: they fit a CPU's cache, and fill a GPU.
_CPU_BLOCK, _CUDA_BLOCK = 2**18, 2**25


class Nucleus(NamedTuple):
    """What the gradient of nucleus entropies needs: the lowest logits, ``[T]``, and the totals of the cut rows."""

    lowest: torch.Tensor
    totals: Totals

    @classmethod
    def of(cls, values: Sequence[torch.Tensor]) -> Nucleus:
        """The one whose `flat` is ``values``."""
        return cls(values[0], Totals(*values[1:]))

    def flat(self) -> tuple[torch.Tensor, ...]:
        """Its tensors in one tuple, for autograd to save."""
        return self.lowest, *self.totals

    def select(self, rows: slice | torch.Tensor) -> Nucleus:
        """The same for some of the rows."""
        return Nucleus(self.lowest[rows], self.totals.select(rows))


def check_share(nucleus: float | None) -> None:
    """Refuse a share of the mass outside (0, 1]."""
    if nucleus is not None and not 0.0 < nucleus <= 1.0:
        raise ValueError(f"nucleus must lie in (0, 1], got {nucleus}; give the share of mass, or None for no nucleus")


def row_slices(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Cuts ``rows`` rows into blocks of a size that suits the search."""
    size = max((_CPU_BLOCK if device.type == "cpu" else _CUDA_BLOCK) // max(width, 1), 1)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def lowest_logits(
    blocks: Blocks,
    max_T: torch.Tensor,
    temperature_T: torch.Tensor,
    share: float,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """The lowest raw logit in the nucleus of each row, ``[T]``; NaN, below which no logit lies, for a share of 1.

    Does one all-reduce of ``[T, 2050]`` fp64 sums for each digit: three of them, or six for fp64 logits.

    Args:
        blocks: Gives, each time it is called, all rows of this rank's logits in the statistics' dtype, block by block.
        max_T: Largest logit of each row over all shards.
        temperature_T: Temperature of each row.
        share: Mass of the nucleus, in (0, 1].
        group: Ranks over which the vocabulary is sharded.
    """
    if share == 1.0:
        # Rounding would let a sum reach the whole before its last terms.
        return torch.full_like(max_T, torch.nan)
    bits = torch.finfo(max_T.dtype).bits
    lows = range(0, bits, _DIGIT_BITS)[::-1]
    # Of the values that a digit can take after those found so far, this is the least: first, that of the least integer.
    base_T1 = torch.full((len(max_T), 1), -(2 ** (bits - 1 - lows[0])), dtype=torch.int64, device=max_T.device)
    needed_T1: torch.Tensor | None = None
    centre_T = max_T.masked_fill(max_T == -torch.inf, 0.0)
    for low in lows:
        mass_TD = torch.zeros(len(max_T), _DIGITS + 2, dtype=torch.float64, device=max_T.device)
        for rows, logits_tV in blocks():
            _tally_(mass_TD[rows], logits_tV, low, base_T1[rows], centre_T[rows, None], temperature_T[rows, None])
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(mass_TD, group=group)
        from_top_TD = mass_TD.flip(1).cumsum(1)
        if needed_T1 is None:
            needed_T1 = share * from_top_TD[:, -1:]
        short_T1 = (from_top_TD < needed_T1).sum(1, keepdim=True)
        base_T1 = base_T1 + (_DIGITS - short_T1).clamp(0, _DIGITS - 1)
        if low > 0:
            base_T1 = base_T1 << _DIGIT_BITS
    return _sorted_image(base_T1.squeeze(1).to(_integers(max_T.dtype))).view(max_T.dtype)


def _integers(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def _sorted_image(bits: torch.Tensor) -> torch.Tensor:
    """Bits of floats as integers of the same order; its own inverse."""
    info = torch.iinfo(bits.dtype)
    return bits ^ (bits >> (info.bits - 1)).bitwise_and_(info.max)


def _tally_(
    mass_tD: torch.Tensor,
    logits_tV: torch.Tensor,
    low: int,
    base_t1: torch.Tensor,
    max_t1: torch.Tensor,
    temperature_t1: torch.Tensor,
) -> None:
    """Add each logit's mass to its digit's; the first and the last column take what lies below and above ``base``."""
    digit_tV = _sorted_image(logits_tV.view(_integers(logits_tV.dtype))).bitwise_right_shift_(low)
    under_t1 = (base_t1 - 1).to(digit_tV.dtype)
    torch.maximum(digit_tV, under_t1, out=digit_tV)
    torch.minimum(digit_tV, under_t1 + (_DIGITS + 1), out=digit_tV)
    mass_tV = (logits_tV - max_t1).div_(temperature_t1).exp_()
    mass_tD.scatter_add_(1, digit_tV.sub_(under_t1).long(), mass_tV.double())


def cut_(logits_TV: torch.Tensor, lowest_T: torch.Tensor) -> None:
    """Make the logits outside the nucleus ``-inf``; NaN stays."""
    logits_TV.masked_fill_(logits_TV < lowest_T[:, None], -torch.inf)


def finish_nucleus(
    state_TK: torch.Tensor,
    lowest_T: torch.Tensor,
    columns_T: torch.Tensor,
    temperature_T: torch.Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, Nucleus]:
    """Nucleus entropies from this shard's states of the cut rows, by one all-gather, and what their gradient needs."""
    state = over_ranks(state_TK, temperature_T, group)
    stats = finish(state, temperature_T)
    return stats.entropy, Nucleus(lowest_T, totals(state, stats, columns_T, temperature_T))


def nucleus_gradient(
    rows: Rows, nucleus: Nucleus, grad_nucleus_T: torch.Tensor, active: torch.Tensor | None = None
) -> torch.Tensor:
    """Gradient in the raw logits of ``sum(g * N)``, where ``rows`` saw the cut logits last; see `Rows.gradient`."""
    return rows.gradient(nucleus.totals, torch.zeros_like(grad_nucleus_T), grad_nucleus_T, active)


class CutRows:
    """The row passes over a copy of a chunk of logits that is cut down to the nucleus of each row."""

    def __init__(self, rows: Rows, share: float, group: dist.ProcessGroup | None) -> None:
        """Use the buffers of ``rows`` for nuclei that hold ``share`` of the mass over all shards in ``group``."""
        self._rows, self._share, self._group = rows, share, group

    def fill(self, logits_TV: torch.Tensor) -> None:
        """Take a copy of the logits of a chunk, still whole."""
        self._rows.logits[: len(logits_TV)].copy_(logits_TV)

    def state(
        self, max_T: torch.Tensor, columns_T: torch.Tensor, temperature_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lowest logit of each nucleus, and this shard's states of the rows cut there; collective.

        Args:
            max_T: Largest logit of each row over all shards.
            columns_T: Column of each row's target.
            temperature_T: Temperature of each row.
        """
        logits_TV = self._rows.logits[: len(max_T)]
        slices = list(row_slices(len(max_T), logits_TV.shape[1], logits_TV.device))
        lowest_T = lowest_logits(
            lambda: ((rows, logits_TV[rows]) for rows in slices), max_T, temperature_T, self._share, self._group
        )
        cut_(logits_TV, lowest_T)
        return lowest_T, self._rows.state(columns_T, temperature_T, extras=False)

    def recall(self, nucleus: Nucleus) -> None:
        """Instead of `state`, where the nuclei are known already."""
        cut_(self._rows.logits[: len(nucleus.lowest)], nucleus.lowest)
        self._rows.recall(nucleus.totals.max, nucleus.totals.temperature)

    def gradient(
        self, nucleus: Nucleus, grad_nucleus_T: torch.Tensor, active: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gradient in the raw logits of ``sum(g * N)``; uses the chunk up."""
        return nucleus_gradient(self._rows, nucleus, grad_nucleus_T, active)
