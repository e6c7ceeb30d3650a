"""Exact selections and sums over the tokens of all ranks: the same bits however tokens are split and ordered.

Every function takes this rank's tokens ``[T]`` and a ``group``. With a group it is a collective that every member
enters, with no tokens if it has none; with None the tokens at hand are all there are. Ranking compares integer images
of floats, ties go to the lower global token index, sums are added up as integers and random numbers hash the index, so
that nothing here depends on the layout.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.distributed as dist

from megatron_rlvr.core import RLVRError

_DIGIT_BITS = 16
_BINS = 1 << _DIGIT_BITS
_LARGEST_INT = 2**63 - 1
_TINIEST_EXPONENT = -900  # keeps the scale of a sum finite; no fp32 value is below 2**-149


def kth_largest(values_T: torch.Tensor, k: int, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The ``k``-th largest value over all ranks, exactly, counting equal values as often as they occur.

    Five all-reduces, of counts only: no rank ever sees another's values.

    Args:
        values_T: Values of this rank, any float dtype; infinities are values, and -0 counts as 0.
        k: Rank of the wanted value, 1 for the largest.
        group: Ranks that hold the tokens.

    Returns:
        The value, 0-d, of the dtype of ``values_T``, on its device.

    Raises:
        RLVRError: On every rank, if a value is NaN or there are fewer than ``k`` values.
    """
    total = _count_ordered(values_T, group)
    if not 1 <= k <= total:
        raise RLVRError(f"the {k}-th largest of {total} token values was asked for; k must lie in 1 .. {total}")
    image, _, _ = _kth_image(_ordered(values_T), k, group)
    bits = image if image >= 0 else image ^ _LARGEST_INT
    return torch.tensor(bits, device=values_T.device).view(torch.float64).to(values_T.dtype)


def largest(
    values_T: torch.Tensor,
    index_T: torch.Tensor,
    count: int,
    *,
    among_T: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The ``count`` tokens of largest value over all ranks, all of them if there are fewer.

    Args:
        values_T: Values of this rank, any float dtype.
        index_T: Global index of each token, int64, unique over all ranks; of equal values the lower index is taken.
        count: How many tokens to take over all ranks, the same number on every rank.
        among_T: True where a token may be taken, bool; None allows all.
        group: Ranks that hold the tokens.

    Returns:
        True where this rank's token is taken, ``[T]`` bool; over all ranks exactly min(count, allowed) are.

    Raises:
        RLVRError: On every rank, if an allowed value is NaN or the choice hangs on an index that two tokens share.
    """
    mask_T = torch.zeros_like(values_T, dtype=torch.bool)
    place_T = _places(mask_T, among_T)
    considered_T = values_T[place_T]
    count = min(count, _count_ordered(considered_T, group))
    if count < 1:
        return mask_T
    image_T = _ordered(considered_T)
    threshold, wanted, ties = _kth_image(image_T, count, group)
    tied_T = image_T == threshold
    if wanted < ties:
        order_T = -index_T[place_T]
        last, _, twins = _kth_image(order_T[tied_T], wanted, group)
        if twins > 1:
            raise RLVRError(
                f"{twins} response tokens have the global index {-last}; number the tokens of all ranks without repeats"
            )
        tied_T &= order_T >= last
    mask_T[place_T] = tied_T | (image_T > threshold)
    return mask_T


def largest_per_row(
    values_T: torch.Tensor,
    index_T: torch.Tensor,
    row_T: torch.Tensor,
    share: float,
    *,
    among_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tokens of largest value in each row, ``portion(share, n)`` of the n tokens that the row may take.

    Needs no group: the result does not depend on the layout as long as every row lies whole on one rank.

    Args:
        values_T: Values, any float dtype.
        index_T: Global index of each token, int64, unique; of equal values the lower index is taken.
        row_T: Row of each token, int64.
        share: Share of each row's allowed tokens to take, in [0, 1].
        among_T: True where a token may be taken, bool; None allows all.

    Returns:
        True where a token is taken, ``[T]`` bool.

    Raises:
        RLVRError: If an allowed value is NaN or ``share`` is out of range.
    """
    mask_T = torch.zeros_like(values_T, dtype=torch.bool)
    order_T = _places(mask_T, among_T)
    _count_ordered(values_T[order_T], None)
    image_T = _ordered(values_T)
    for key_T, descending in ((index_T, False), (image_T, True), (row_T, False)):
        order_T = order_T[key_T[order_T].argsort(stable=True, descending=descending)]
    _, sizes_B = torch.unique(row_T[order_T], return_counts=True)  # in the order of the rows, as the tokens now are
    taken_B = sizes_B.new_tensor([portion(share, size) for size in sizes_B.tolist()])
    first_B = sizes_B.cumsum(0) - sizes_B
    rank_T = torch.arange(len(order_T), device=order_T.device) - first_B.repeat_interleave(sizes_B)
    mask_T[order_T[rank_T < taken_B.repeat_interleave(sizes_B)]] = True
    return mask_T


def portion(share: float, total: int) -> int:
    """How many of ``total`` tokens a share is: floor(share * total), but at least one where either has any.

    The decimals of ``share`` are taken at their word: 0.29 of 100 is 29, though the product of floats is below it.

    Raises:
        RLVRError: If ``share`` is not in [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise RLVRError(f"the share of tokens to take is {share} but a share lies in [0, 1]")
    return max(1, math.floor(Fraction(str(share)) * total)) if share > 0 and total > 0 else 0


def uniform(index_T: torch.Tensor, seed: int) -> torch.Tensor:
    """Random numbers in [0, 1) that are a function of ``index_T`` and ``seed`` alone.

    Number i is output i of the generator splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014) whose state starts at the hash of ``seed``, with its upper 53 bits as the fraction.

    Args:
        index_T: Global index of each token, int64.
        seed: Any integer of 64 bits.

    Returns:
        fp64 of the shape of ``index_T``.
    """
    start = _mix(torch.tensor(seed, dtype=torch.int64, device=index_T.device))
    bits_T = _mix(start + (index_T + 1) * _signed(0x9E3779B97F4A7C15))
    return _shift_right(bits_T, 11).double() * 2.0**-53


def global_count(mask_T: torch.Tensor, group: dist.ProcessGroup | None = None) -> int:
    """How many tokens of all ranks are True in ``mask_T``."""
    return int(_all_reduce(mask_T.sum(), group))


def global_sum(values_T: torch.Tensor, group: dist.ProcessGroup | None = None) -> float:
    """Sum over all ranks, in any order the same bits.

    Values are added as integers, multiples of about 2**-84 of the largest for a million tokens. The sum of fp32 values
    within 2**-60 of the largest is therefore exact but for its rounding to fp64, and any other one closer than in fp64.

    Raises:
        RLVRError: On every rank, if a value is NaN or infinite.
    """
    wide_T = values_T.double()
    total = _count_ordered(wide_T, group)
    if total == 0:
        return 0.0
    limit = global_max(wide_T.abs(), group)
    if math.isinf(limit):
        raise RLVRError("a token value to be summed is infinite; look for non-finite logits in the policy")
    exponent = max(math.frexp(limit)[1], _TINIEST_EXPONENT)
    bits = 62 - total.bit_length()  # the largest sum then fits an int64
    scaled_T = wide_T * 2.0 ** (bits - exponent)
    high_T = scaled_T.trunc()
    low_T = ((scaled_T - high_T) * 2.0**bits).round()
    high, low = _all_reduce(torch.stack([high_T, low_T]).long().sum(dim=1), group).tolist()
    return math.ldexp((high << bits) + low, exponent - 2 * bits)


def global_mean(values_T: torch.Tensor, group: dist.ProcessGroup | None = None) -> float:
    """Mean over all ranks: ``global_sum`` over the number of values.

    Raises:
        RLVRError: On every rank, if there are no values or one is NaN or infinite.
    """
    count = global_count(torch.ones_like(values_T, dtype=torch.bool), group)
    if count == 0:
        raise RLVRError("the mean of no response tokens was asked for; a step needs at least one row with a verdict")
    return global_sum(values_T, group) / count


def global_max(values_T: torch.Tensor, group: dist.ProcessGroup | None = None) -> float:
    """Largest value over all ranks, -inf if there are none."""
    local = values_T.double().amax() if len(values_T) else values_T.new_tensor(-math.inf, dtype=torch.float64)
    return float(_all_reduce(local, group, dist.ReduceOp.MAX))


def _all_reduce(
    values: torch.Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(values, op, group)
    return values


def _places(mask_T: torch.Tensor, among_T: torch.Tensor | None) -> torch.Tensor:
    """Positions of the allowed tokens."""
    return torch.arange(len(mask_T), device=mask_T.device) if among_T is None else among_T.nonzero().squeeze(1)


def _count_ordered(values_T: torch.Tensor, group: dist.ProcessGroup | None) -> int:
    """Number of values over all ranks; NaN, which has no order, is refused by all ranks together."""
    counts = torch.stack([torch.ones_like(values_T, dtype=torch.bool).sum(), values_T.isnan().sum()])
    total, nans = _all_reduce(counts, group).tolist()
    if nans:
        raise RLVRError(
            f"{nans} of {total} token values are NaN and cannot be ranked or summed; look for non-finite logits in the "
            "policy"
        )
    return int(total)


def _ordered(values_T: torch.Tensor) -> torch.Tensor:
    """Integers in the order of ``values_T``, equal where values are equal; adding 0 turns -0 into 0."""
    bits_T = (values_T.double() + 0.0).view(torch.int64)
    return bits_T ^ ((bits_T >> 63) & _LARGEST_INT)


def _kth_image(image_T: torch.Tensor, k: int, group: dist.ProcessGroup | None) -> tuple[int, int, int]:
    """The k-th largest integer over all ranks, how many of its equals are among the k, and how many there are.

    A radix search: the highest digit is settled first, from the number of integers with each digit on all ranks.
    """
    found, ties = 0, 0
    rest_T = image_T ^ ~_LARGEST_INT  # without a sign: the digits then order as the integers do
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        digit_T = (rest_T >> shift) & (_BINS - 1)
        counts = _all_reduce(torch.bincount(digit_T, minlength=_BINS), group)
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, k))
        digit, ties = _BINS - 1 - place, int(counts[_BINS - 1 - place])
        k -= int(from_top[place]) - ties
        found = found << _DIGIT_BITS | digit
        rest_T = rest_T[digit_T == digit]
    return found - 2**63, k, ties


def _mix(state: torch.Tensor) -> torch.Tensor:
    """The output function of splitmix64; products wrap around as they do without a sign."""
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shift_right(state, 31)


def _shift_right(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift that fills up with zeros; torch's own repeats the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64
