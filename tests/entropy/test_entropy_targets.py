"""Targets: every form of the text, hand-computed courses, shares of the first signal, refusals."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy.targets import Target, course, exact


def at_all(text: str | float, steps: int, first: float | None = None) -> list[float]:
    """The target in every planned step and two more."""
    target = Target.parse(text, steps)
    if first is not None:
        target.observe(first)
    return [target.at(step) for step in range(steps + 2)]


@pytest.mark.parametrize("text", [0.2, "0.2", " .2 ", "2e-1", "0.20"])
def test_nats_are_the_same_in_every_step(text: str | float) -> None:
    assert at_all(text, 3) == [0.2] * 5
    assert Target.parse(text, 3).known


def test_a_linear_course_is_exact_on_decimals() -> None:
    # 0.6 - 0.2 * k / 4 in steps 0 .. 4, then it stays
    assert at_all("0.6 -> 0.4", 5) == [0.6, 0.55, 0.5, 0.45, 0.4, 0.4, 0.4]
    assert at_all("0.4->0.6", 2) == [0.4, 0.6, 0.6, 0.6]
    assert at_all("0.6 -> 0.4", 1) == [0.4] * 3


def test_a_cosine_course_is_flat_at_both_ends() -> None:
    # 0.6 - 0.2 * (1 - cos(pi k / 4)) / 2: at k = 1 the cosine is sqrt(1/2)
    quarter = 0.6 - 0.2 * (1 - math.sqrt(0.5)) / 2
    assert at_all("0.6 ~> 0.4", 5) == pytest.approx([0.6, quarter, 0.5, 1.0 - quarter, 0.4, 0.4, 0.4], abs=1e-15)


def test_shares_refer_to_the_first_signal_only() -> None:
    target = Target.parse("75%", 10)
    assert not target.known
    with pytest.raises(RLVRError, match=r"entropy\.target is a share"):
        target.at(0)
    target.observe(0.4)
    target.observe(9.0)
    assert target.first == 0.4
    assert target.at(0) == target.at(9) == 0.3
    assert at_all("100% -> 50%", 3, first=0.8) == [0.8, 0.6, 0.4, 0.4, 0.4]
    assert at_all("100% -> 0.2", 3, first=0.8) == [0.8, 0.5, 0.2, 0.2, 0.2]
    assert at_all("50%", 1, first=0.0) == [0.0] * 3
    assert at_all("0.2", 1, first=0.8) == [0.2] * 3


@pytest.mark.parametrize(
    "text",
    [
        -0.1,
        math.nan,
        math.inf,
        True,
        "",
        "low",
        "0.6 -> ",
        "-> 0.4",
        "0.6 => 0.4",
        "0.6 -> 0.4 -> 0.2",
        "75 % %",
        "1/2",
    ],
)
def test_anything_else_is_refused_in_words(text: str | float) -> None:
    with pytest.raises(RLVRError, match=r"entropy\.target is .* but must be an entropy in nats such as 0\.2"):
        Target.parse(text, 10)


@given(
    start=st.floats(0.0, 3.0),
    end=st.floats(0.0, 3.0),
    steps=st.integers(1, 40),
    cosine=st.booleans(),
    first=st.floats(0, 3),
)
def test_a_course_never_leaves_its_ends_nor_turns_back(
    start: float, end: float, steps: int, cosine: bool, first: float
) -> None:
    values = at_all(f"{start} {'~>' if cosine else '->'} {end}", steps, first)
    assert all(min(start, end) <= value <= max(start, end) for value in values)
    assert values == sorted(values, reverse=start > end)
    assert values[-3:] == [end] * 3
    assert steps == 1 or values[0] == start


def test_decimals_are_taken_at_their_word() -> None:
    assert exact(0.05) == Fraction(1, 20)
    assert course(exact(0.1), exact(0.7), 1, 4) == Fraction(3, 10)
