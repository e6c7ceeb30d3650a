"""Advantage estimators against numbers worked out by hand, enumeration over subsets, and rows that must not count."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.core import RLVRError
from megatron_rlvr.objective import ESTIMATORS, Outcomes, whiten

ALL = [(name, {"k": 2} if name == "pass_at_k" else {}) for name in ESTIMATORS]
ROWS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1.0]),
        st.sampled_from([-7, 0, 10**12]),
        st.booleans(),
        st.integers(1, 9),
        st.sampled_from([-0.5, -0.25, -2.0]),
    ),
    min_size=1,
    max_size=20,
)


def outcomes(rewards, groups=None, valid=None, lengths=None, logprobs=None) -> Outcomes:
    """Rows in float64; one group, all valid, of 3 tokens each unless said."""
    size = len(rewards)
    return Outcomes(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(groups or [0] * size),
        torch.tensor(valid or [True] * size),
        torch.tensor(lengths or [3] * size),
        torch.tensor(logprobs or [-1.0] * size, dtype=torch.float64),
    )


def of(name: str, rows: Outcomes, **options: float) -> list[float]:
    return ESTIMATORS[name](rows, **options).tolist()


def test_dr_grpo_and_rloo_by_hand() -> None:
    rows = outcomes([1.0, 0.0, 0.0, 0.0, 0.5, 2.0], groups=[0, 0, 0, 0, 1, 1])
    assert of("dr_grpo", rows) == [0.75, -0.25, -0.25, -0.25, -0.75, 0.75]
    # 1 - mean(0, 0, 0); 0 - mean(1, 0, 0); 0.5 - 2; 2 - 0.5
    assert of("rloo", rows) == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3, -1.5, 1.5], rel=1e-12)


def test_reinforce_pp_by_hand() -> None:
    # tokens 1, 1, 0, 0, 0, 0, 0, 0: mean 1/4, unbiased variance 12/8 / 7
    rows = outcomes([1.0, 0.0, 0.0], groups=[0, 1, 2], lengths=[2, 5, 1])
    std = math.sqrt(1.5 / 7 + 1e-8)
    assert of("reinforce_pp", rows) == pytest.approx([0.75 / std, -0.25 / std, -0.25 / std], rel=1e-12)


def test_reinforce_pp_baseline_by_hand() -> None:
    # deviations .5 (1 token), -.5 (3 tokens) and 0 (4 tokens): mean -1/8
    rows = outcomes([1.0, 0.0, 1.0], groups=[0, 0, 1], lengths=[1, 3, 4])
    tokens = [0.5, -0.5, -0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
    std = math.sqrt(statistics.variance(tokens) + 1e-8)
    assert of("reinforce_pp_baseline", rows) == pytest.approx([0.625 / std, -0.375 / std, 0.125 / std], rel=1e-12)


def test_pass_at_k_by_hand() -> None:
    # n 4, one right, k 2: F = C(3,2)/C(4,2) = 1/2, so A = 1 and -1/3
    assert of("pass_at_k", outcomes([1.0, 0.0, 0.0, 0.0]), k=2) == pytest.approx([1.0, *[-1 / 3] * 3], rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("rights", range(7))
def test_pass_at_k_equals_enumeration(k: int, rights: int) -> None:
    rewards = [1.0] * rights + [0.0] * (6 - rights)
    subsets = list(itertools.combinations(range(6), k))
    best = [max(rewards[row] for row in subset) for subset in subsets]
    mean, std = statistics.fmean(best), statistics.pstdev(best)
    expected = [
        statistics.fmean((b - mean) / std if std else 0.0 for b, s in zip(best, subsets, strict=True) if row in s)
        for row in range(6)
    ]
    assert of("pass_at_k", outcomes(rewards), k=k) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_pass_at_k_of_fewer_rows_than_k_is_zero() -> None:
    assert of("pass_at_k", outcomes([1.0, 0.0, 1.0], valid=[True, True, False]), k=3) == [0.0] * 3
    with pytest.raises(RLVRError, match="pass_at_k has k=0; give"):
        of("pass_at_k", outcomes([1.0]), k=0)


def test_unlikeliness_by_hand() -> None:
    rows = outcomes([1.0, 1.0, 0.0, 1.0], logprobs=[-0.1, -2.0, -1.0, -2.0])
    # ranks 3, 0, 2, 0 of 4: rewards 1 - .25 * 3/4, 1, 0, 1
    rewards = [0.8125, 1.0, 0.0, 1.0]
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards) + 1e-6
    assert of("unlikeliness", rows) == pytest.approx([(r - mean) / std for r in rewards], rel=1e-12)
    assert of("unlikeliness", rows, beta=0.0) == of("grpo", rows)
    with pytest.raises(RLVRError, match="unlikeliness has beta=2"):
        of("unlikeliness", rows, beta=2.0)


def test_outcome_says_right_or_wrong() -> None:
    assert of("outcome", outcomes([1.0, 1.0, 0.5, 0.0], valid=[True, True, True, False])) == [1.0, 1.0, -1.0, 0.0]


def test_asym_grpo_by_hand() -> None:
    rows = outcomes([1.0, 0.0, 0.0, 0.0, 0.0])
    assert of("asym_grpo", rows) == pytest.approx([2.0, *[-0.5] * 4], rel=1e-12)
    assert of("asym_grpo", rows, b_plus=1.0, b_minus=0.0) == pytest.approx([4.0, *[-1.0] * 4], rel=1e-12)
    assert of("asym_grpo", outcomes([1.0, 1.0])) == of("asym_grpo", outcomes([0.0, 0.0])) == [0.0, 0.0]
    with pytest.raises(RLVRError, match="asym_grpo has b_plus=-1"):
        of("asym_grpo", rows, b_plus=-1.0)


@pytest.mark.parametrize("name", ["pass_at_k", "asym_grpo"])
def test_rewards_between_right_and_wrong_are_refused(name: str) -> None:
    options = dict(ALL)[name]
    with pytest.raises(RLVRError, match=rf"{name} advantages count right and wrong answers, but a reward is 0\.5"):
        of(name, outcomes([0.5, 1.0]), **options)
    of(name, outcomes([0.5, 1.0], valid=[False, True]), **options)


@pytest.mark.parametrize(("name", "options"), ALL)
@given(rows=ROWS, order=st.randoms(use_true_random=False))
def test_order_of_rows_does_not_show(name: str, options: dict, rows: list, order) -> None:
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    base = of(name, outcomes(*map(list, zip(*rows, strict=True))), **options)
    moved = of(name, outcomes(*map(list, zip(*[rows[k] for k in shuffled], strict=True))), **options)
    assert moved == pytest.approx([base[k] for k in shuffled], rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize(("name", "options"), ALL)
def test_rows_without_a_verdict_touch_nothing(name: str, options: dict, garbage: float) -> None:
    columns = [1.0, 0.0, 0.0, 1.0], [0, 0, 0, 1], [True] * 4, [2, 5, 1, 4], [-1.0, -0.5, -2.0, -1.0]
    more = [garbage, garbage], [0, 2], [False, False], [7, 7], [garbage, garbage]
    base = of(name, outcomes(*columns), **options)
    dirty = of(name, outcomes(*(a + b for a, b in zip(columns, more, strict=True))), **options)
    assert dirty == [*base, 0.0, 0.0]


@pytest.mark.parametrize(("name", "options"), [case for case in ALL if case[0] not in ("outcome", "unlikeliness")])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_give_exactly_zero(name: str, options: dict, reward: float) -> None:
    assert of(name, outcomes([reward] * 5, groups=[0, 0, 0, 1, 1], lengths=[1, 2, 3, 4, 5]), **options) == [0.0] * 5


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline", "unlikeliness"])
def test_what_an_estimator_needs_is_named(name: str) -> None:
    bare = Outcomes(torch.ones(2), torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"the {name} advantages need (lengths_B|mean_logprob_B)"):
        of(name, bare)


@given(values=st.lists(st.tuples(st.sampled_from([-1.0, 0.1, 0.1, 3.0]), st.integers(0, 4)), min_size=1, max_size=9))
def test_whitening_counts_tokens(values: list[tuple[float, int]]) -> None:
    x, n = (torch.tensor(column, dtype=torch.float64) for column in zip(*values, strict=True))
    tokens = [value for value, times in values for _ in range(times)]
    got = whiten(x, n).tolist()
    if len(set(tokens)) < 2:
        assert got == [0.0] * len(values)
        return
    mean, std = statistics.fmean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
    assert got == pytest.approx([(value - mean) / std if times else 0.0 for value, times in values], abs=1e-9)
