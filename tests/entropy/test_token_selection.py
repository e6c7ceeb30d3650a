"""Selections and sums against sorting, exact fractions and published random numbers; refusals in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_shards import special_values

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy.selection import (
    global_max,
    global_mean,
    global_sum,
    kth_largest,
    largest,
    largest_per_row,
    portion,
    uniform,
)

FLOAT32 = st.floats(width=32, allow_nan=False)
FINITE32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def shuffled(tokens: int, seed: int) -> torch.Tensor:
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_largest_of_special_values_is_the_kth_of_the_sort(dtype: torch.dtype) -> None:
    values = special_values().to(dtype)
    expected = (values.sort(descending=True).values + 0.0).tolist()
    assert [kth_largest(values, k + 1).item() for k in range(len(values))] == expected


def test_kth_largest_tells_neighbours_and_the_smallest_doubles_apart() -> None:
    one = math.nextafter(1.0, 2.0)
    values = torch.tensor([5e-324, 0.0, 1.0, -5e-324, one, math.nextafter(one, 2.0)], dtype=torch.float64)
    got = [kth_largest(values, k).item() for k in range(1, 7)]
    assert got == [math.nextafter(one, 2.0), one, 1.0, 5e-324, 0.0, -5e-324]


def test_kth_largest_keeps_the_dtype_and_returns_positive_zero() -> None:
    assert math.copysign(1.0, kth_largest(torch.tensor([-0.0, -0.0]), 1).item()) == 1.0
    assert kth_largest(torch.tensor([1.5], dtype=torch.bfloat16), 1).dtype == torch.bfloat16


@given(values=st.lists(FLOAT32, min_size=1, max_size=40), data=st.data())
def test_kth_largest_is_the_kth_of_the_sort(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    assert kth_largest(torch.tensor(values), k).item() == sorted(values, reverse=True)[k - 1]


@pytest.mark.parametrize("k", [0, -1, 4])
def test_kth_largest_refuses_a_rank_that_does_not_exist(k: int) -> None:
    with pytest.raises(RLVRError, match=rf"the {k}-th largest of 3 token values .* 1 .. 3"):
        kth_largest(torch.zeros(3), k)


def test_nan_is_refused_in_words() -> None:
    values = torch.tensor([1.0, torch.nan, 2.0])
    for call in (
        lambda: kth_largest(values, 1),
        lambda: largest(values, torch.arange(3), 1),
        lambda: largest_per_row(values, torch.arange(3), torch.zeros(3, dtype=torch.long), 0.5),
        lambda: global_sum(values),
    ):
        with pytest.raises(RLVRError, match=r"1 of 3 token values are NaN .* non-finite logits"):
            call()
    allowed = torch.tensor([True, False, True])
    assert largest(values, torch.arange(3), 1, among_T=allowed).tolist() == [False, False, True]


def test_ties_go_to_the_lower_index() -> None:
    values = torch.tensor([2.0, 3.0, 2.0, 0.0, -0.0, 2.0])
    index = torch.tensor([90, 10, 70, 20, 15, 80])
    # 3 first, then the three 2s by index 70, 80, 90, then the zeros of either sign by index 15, 20.
    order = [1, 2, 5, 0, 4, 3]
    for count in range(8):
        expected = [place in order[:count] for place in range(6)]
        assert largest(values, index, count).tolist() == expected


def test_an_index_given_twice_is_refused_where_it_decides() -> None:
    values, index = torch.zeros(3), torch.tensor([4, 4, 9])
    with pytest.raises(RLVRError, match="2 response tokens have the global index 4; number the tokens of all ranks"):
        largest(values, index, 1)
    assert largest(values, index, 3).all()


@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, -math.inf]) | FLOAT32, min_size=1, max_size=40),
    count=st.integers(0, 45),
    seed=st.integers(0, 99),
)
def test_largest_takes_exactly_so_many_and_no_lesser_one(values: list[float], count: int, seed: int) -> None:
    tokens, order = torch.tensor(values), shuffled(len(values), seed)
    mask = largest(tokens, torch.arange(len(values)), count)
    assert int(mask.sum()) == min(count, len(values))
    best = sorted(range(len(values)), key=lambda place: (-values[place], place))[:count]
    assert mask.nonzero().flatten().tolist() == sorted(best)
    assert torch.equal(largest(tokens[order], order, count), mask[order])


@given(
    rows=st.lists(st.lists(st.sampled_from([0.0, 1.0]) | FLOAT32, min_size=1, max_size=9), min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.2, 0.29, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_largest_per_row_is_largest_in_each_row(rows: list[list[float]], share: float, seed: int) -> None:
    values = torch.tensor([value for row in rows for value in row])
    ids = torch.cat([torch.full((len(row),), 40 - 3 * place) for place, row in enumerate(rows)])
    index = torch.arange(len(values))
    among = torch.arange(len(values)) % 4 != 1
    expected = torch.zeros(len(values), dtype=torch.bool)
    for name in set(ids.tolist()):
        allowed = among & (ids == name)
        expected |= largest(values, index, portion(share, int(allowed.sum())), among_T=allowed)
    assert torch.equal(largest_per_row(values, index, ids, share, among_T=among), expected)
    order = shuffled(len(values), seed)
    got = largest_per_row(values[order], index[order], ids[order], share, among_T=among[order])
    assert torch.equal(got, expected[order])


def test_selections_of_nothing() -> None:
    none, ids = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert largest(none, ids, 3).shape == largest_per_row(none, ids, ids, 0.2).shape == (0,)
    assert uniform(ids, 0).shape == (0,)
    assert (global_sum(none), global_max(none)) == (0.0, -math.inf)
    with pytest.raises(RLVRError, match="mean of no response tokens"):
        global_mean(none)


@pytest.mark.parametrize(
    ("share", "total", "count"),
    [
        (0.2, 10, 2),
        (0.2, 14, 2),  # 2.8
        (0.29, 100, 29),  # 28.999… in floats
        (2e-4, 9999, 1),  # 1.9998
        (2e-4, 10000, 2),
        (2e-4, 3, 1),  # 0.0006: at least one
        (2e-4, 0, 0),
        (0.0, 50, 0),
        (1.0, 7, 7),
    ],
)
def test_portion(share: float, total: int, count: int) -> None:
    assert portion(share, total) == count


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_portion_refuses_what_is_no_share(share: float) -> None:
    with pytest.raises(RLVRError, match=f"share of tokens to take is {share}"):
        portion(share, 10)


def splitmix64(state: int, steps: int) -> int:
    """The generator in integers without bounds."""
    word = 2**64
    state = (state + steps * 0x9E3779B97F4A7C15) % word
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % word
    state = (state ^ state >> 27) * 0x94D049BB133111EB % word
    return state ^ state >> 31


def test_uniform_is_splitmix64() -> None:
    # First outputs for seed 0, as published with the generator's reference code (the hash of 0 is 0).
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [splitmix64(0, step) for step in (1, 2, 3)] == published
    assert uniform(torch.arange(3), 0).tolist() == [(word >> 11) / 2**53 for word in published]


@given(index=st.integers(0, 2**50), seed=st.integers(-(2**63), 2**63 - 1))
def test_uniform_is_a_function_of_index_and_seed(index: int, seed: int) -> None:
    start = splitmix64(seed % 2**64, 0)
    got = uniform(torch.tensor([3, index]), seed)
    assert got.dtype == torch.float64
    assert got[1].item() == (splitmix64(start, index + 1) >> 11) / 2**53


def test_uniform_is_uniform_and_seeds_do_not_repeat_one_another() -> None:
    one, other = uniform(torch.arange(20000), 1), uniform(torch.arange(20000), 2)
    for numbers in (one, other):
        counts = torch.histc(numbers, 20, 0.0, 1.0)
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square with 19 degrees of freedom, 0.1 %
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.025
    assert len(set(one.tolist() + other.tolist())) == 40000


@given(values=st.lists(FINITE32, max_size=60), seed=st.integers(0, 99))
def test_sum_is_exact_and_the_same_in_any_order(values: list[float], seed: int) -> None:
    exact = sum(map(Fraction, values), Fraction(0))
    got = global_sum(torch.tensor(values))
    limit = max(map(abs, values), default=0.0)
    assert abs(Fraction(got) - exact) <= Fraction(limit) * Fraction(2) ** -80 + abs(exact) * Fraction(2) ** -53
    assert global_sum(torch.tensor(values)[shuffled(len(values), seed)]) == got


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ([1e16, 1.0, -1e16], 1.0),  # fp64 in this order gives 0
        ([3e38, 1.0, -3e38, -0.5], 0.0),  # what is lost is below 2**-116 of the largest
        ([2.0**-149] * 3, 3 * 2.0**-149),
        ([0.1, 0.2, 0.3], 0.6),  # sum of doubles is 0.6000000000000001, the exact sum rounds to 0.6
    ],
)
def test_sums_that_rounding_would_spoil(values: Sequence[float], total: float) -> None:
    assert global_sum(torch.tensor(values, dtype=torch.float64)) == total
    assert global_mean(torch.tensor(values, dtype=torch.float64)) == total / len(values)


def test_infinite_values_are_not_summed() -> None:
    with pytest.raises(RLVRError, match="infinite; look for non-finite logits"):
        global_sum(torch.tensor([1.0, -torch.inf]))
