"""Group advantages against a plain loop, hand-computed values, permutations and rows that must not count."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.objective import grpo_advantages

Row = tuple[float, int, bool]
ROWS = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, 0.1, 0.3, -2.5]), st.sampled_from([-7, 0, 3, 10**12]), st.booleans()),
    max_size=24,
)


def advantages(rows: list[Row]) -> list[float]:
    """Call the function under test on (reward, group, valid) rows."""
    rewards = torch.tensor([row[0] for row in rows], dtype=torch.float32)
    groups = torch.tensor([row[1] for row in rows], dtype=torch.int64)
    valid = torch.tensor([row[2] for row in rows], dtype=torch.bool)
    return [float(value) for value in grpo_advantages(rewards, groups, valid)]


def by_hand(rows: list[Row]) -> list[float]:
    """The definition, one row at a time."""
    expected = []
    for reward, group, valid in rows:
        peers = [float(torch.tensor(r)) for r, g, v in rows if g == group and v]
        if not valid or len(set(peers)) < 2:
            expected.append(0.0)
        else:
            mean = statistics.fmean(peers)
            expected.append((float(torch.tensor(reward)) - mean) / (statistics.stdev(peers) + 1e-6))
    return expected


def test_one_right_of_four() -> None:
    assert advantages([(1.0, 0, True), (0.0, 0, True), (0.0, 0, True), (0.0, 0, True)]) == pytest.approx(
        [0.75 / (0.5 + 1e-6), *[-0.25 / (0.5 + 1e-6)] * 3], rel=1e-6
    )


@given(rows=ROWS)
def test_matches_the_definition(rows: list[Row]) -> None:
    assert advantages(rows) == pytest.approx(by_hand(rows), rel=1e-6, abs=1e-7)


@given(rows=ROWS, order=st.randoms(use_true_random=False))
def test_order_of_rows_does_not_show(rows: list[Row], order: object) -> None:
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    base = advantages(rows)
    assert advantages([rows[k] for k in shuffled]) == [base[k] for k in shuffled]


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_equal_rewards_give_exactly_zero(reward: float, size: int) -> None:
    assert advantages([(reward, 5, True)] * size) == [0.0] * size
    wide = torch.full((size,), reward, dtype=torch.float64)  # three times 0.1 in float64 is not 3 * 0.1
    assert not grpo_advantages(wide, torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.bool)).any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_rows_without_a_verdict_touch_nothing(garbage: float) -> None:
    clean: list[Row] = [(1.0, 0, True), (0.0, 0, True), (1.0, 1, True)]
    base = advantages(clean)
    dirty = advantages([clean[0], (garbage, 0, False), clean[1], clean[2], (garbage, 1, False), (garbage, 2, False)])
    assert dirty == [base[0], 0.0, base[1], base[2], 0.0, 0.0]
    assert base[2] == 0.0


def test_a_nan_verdict_is_not_hidden() -> None:
    got = advantages([(math.nan, 0, True), (1.0, 0, True), (1.0, 1, True), (0.0, 1, True)])
    assert [math.isnan(value) for value in got] == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rewards_B", torch.zeros(2, 1)),
        ("rewards_B", torch.zeros(2, dtype=torch.long)),
        ("groups_B", torch.zeros(3, dtype=torch.long)),
        ("groups_B", torch.zeros(2)),
        ("valid_B", torch.ones(2)),
    ],
)
def test_misuse_is_refused(name: str, value: torch.Tensor) -> None:
    arguments = {
        "rewards_B": torch.zeros(2),
        "groups_B": torch.zeros(2, dtype=torch.long),
        "valid_B": torch.ones(2, dtype=torch.bool),
        name: value,
    }
    with pytest.raises(ValueError, match=name):
        grpo_advantages(**arguments)
