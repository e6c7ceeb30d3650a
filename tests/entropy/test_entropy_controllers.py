"""Open-loop controllers and Eq. 5 against hand-computed sequences, bounds, resume at any step and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy import (
    Constant,
    Controller,
    EntropyGuided,
    EpochWise,
    StageBased,
    mean_entropy,
)
from megatron_rlvr.entropy.controllers import Cosine, Linear
from megatron_rlvr.entropy.signal import sequence_sums

KINDS: dict[str, Callable[[], Controller]] = {
    "constant": lambda: Constant(1.0),
    "entropy_guided": lambda: EntropyGuided(step_size=0.07, initial=0.37),
    "stage_based": lambda: StageBased(30),
    "epoch_wise": lambda: EpochWise(epochs=6, steps_per_epoch=5),
    "linear": lambda: Linear(0.9, 0.2, 30),
    "cosine": lambda: Cosine(-0.2, 0.9, 30),
}


def used_values(controller: Controller, signals: Sequence[float]) -> list[float]:
    """The value that each step uses."""
    used = []
    for signal in signals:
        used.append(controller.value)
        assert controller.update(signal) == controller.value
    return used


def test_entropy_guided_follows_equation_5() -> None:
    controller = EntropyGuided()
    #                                   plus  plus  at delta: plus  minus  minus  minus  stays  plus
    used = used_values(controller, [0.3, 9.0, 0.2, 0.1999, 0.0, 0.1, 0.1, 0.5])
    assert used == [0.0, 0.05, 0.1, 0.15, 0.1, 0.05, 0.0, 0.0]
    assert controller.value == 0.05
    assert (controller.saturated_low, controller.saturated_high) == (3, 0)


def test_twenty_steps_of_a_twentieth_are_exactly_one_and_back() -> None:
    controller = EntropyGuided()
    up = used_values(controller, [1.0] * 22)
    assert up[19] == 0.95
    assert up[20] == up[21] == controller.value == 1.0
    down = used_values(controller, [0.0] * 21)
    assert down[1] == 0.95
    assert down[20] == controller.value == 0.0
    assert (controller.saturated_low, controller.saturated_high) == (2, 3)
    drifting = 0.0
    for _ in range(20):
        drifting += 0.05
    assert drifting != 1.0, "floats would have missed the bound"


def test_steps_that_do_not_divide_the_range_stop_at_the_bound_and_restart_there() -> None:
    assert used_values(EntropyGuided(step_size=0.4, initial=0.1), [1, 1, 1, 0, 0, 0, 1]) == [
        *(0.1, 0.5, 0.9, 1.0),
        *(0.6, 0.2, 0.0),
    ]


@pytest.mark.parametrize(
    ("total_steps", "expected"),
    [
        (1, [1.0]),
        (2, [0.0, 1.0]),
        (5, [0.0, 0.0, 1 / 3, 2 / 3, 1.0]),
        (8, [0.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_stage_based_is_zero_for_half_then_linear_to_one(total_steps: int, expected: list[float]) -> None:
    assert used_values(StageBased(total_steps), [0.1] * (total_steps + 2)) == [*expected, 1.0, 1.0]


def test_epoch_wise_rises_at_each_epoch() -> None:
    controller = EpochWise(epochs=3, steps_per_epoch=2)
    assert used_values(controller, [0.1] * 8) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert (controller.saturated_low, controller.saturated_high) == (2, 4)


def test_ramps_end_in_their_last_step_and_hold() -> None:
    # 0.1 + 0.6 k / 3; the cosine is (1 - cos(pi k / 3)) / 2 = 0, 1/4, 3/4, 1 of the way
    assert used_values(Linear(0.1, 0.7, 4), [0.1] * 6) == [0.1, 0.3, 0.5, 0.7, 0.7, 0.7]
    assert used_values(Cosine(0.1, 0.7, 4), [0.1] * 6) == pytest.approx([0.1, 0.25, 0.55, 0.7, 0.7, 0.7], abs=1e-15)
    assert used_values(Linear(1.0, -1.0, 3), [0.1] * 4) == [1.0, 0.0, -1.0, -1.0]
    falling = Cosine(1.0, 0.0, 2)
    assert used_values(falling, [0.1] * 3) == [1.0, 0.0, 0.0]
    assert (falling.bounds, falling.saturated_low, falling.saturated_high) == ((0.0, 1.0), 2, 1)
    assert used_values(Linear(0.1, 0.7, 1), [0.1]) == [0.7]
    for bad in (lambda: Linear(0.0, math.inf, 4), lambda: Cosine(math.nan, 0.0, 4), lambda: Linear(0.0, 1.0, 0)):
        with pytest.raises(RLVRError, match=r"a (linear|cosine) course"):
            bad()


@pytest.mark.parametrize("course", [Linear, Cosine])
@given(start=st.floats(-2, 2), end=st.floats(-2, 2), steps=st.integers(1, 15))
def test_a_ramp_never_leaves_its_ends(
    course: Callable[[float, float, int], Linear], start: float, end: float, steps: int
) -> None:
    low, high = course(start, end, steps).bounds or (math.nan, math.nan)
    assert all(low <= value <= high for value in used_values(course(start, end, steps), [0.5] * 20))


def test_a_constant_has_no_bounds_to_sit_at() -> None:
    constant = Constant(1.0)
    assert used_values(constant, [0.3] * 3) == [1.0] * 3
    assert (constant.bounds, constant.band, constant.saturated_high) == (None, None, 0)


@given(
    signals=st.lists(st.floats(0.0, 5.0), max_size=80),
    step_size=st.floats(1e-4, 1.0),
    initial=st.floats(0.0, 1.0),
    target=st.floats(0.0, 5.0),
)
def test_entropy_guided_equals_the_paper_within_rounding_and_keeps_its_bounds(
    signals: list[float], step_size: float, initial: float, target: float
) -> None:
    controller = EntropyGuided(target=target, step_size=step_size, initial=initial)
    value, low, high = initial, 0, 0
    for signal in signals:
        assert controller.value == pytest.approx(value, abs=1e-12)
        low, high = low + (controller.value == 0.0), high + (controller.value == 1.0)
        value = min(max(value + (-step_size if signal < target else step_size), 0.0), 1.0)
        assert 0.0 <= controller.update(signal) <= 1.0
    assert (controller.saturated_low, controller.saturated_high) == (low, high)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(signals=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30), cut=st.integers(0, 30))
def test_resuming_at_any_step_changes_nothing(kind: str, signals: list[float], cut: int) -> None:
    uninterrupted, first, second = (KINDS[kind]() for _ in range(3))
    whole = used_values(uninterrupted, signals)
    parts = used_values(first, signals[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert parts + used_values(second, signals[cut:]) == whole
    assert second.state_dict() == uninterrupted.state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signal", [math.nan, math.inf, -math.inf])
def test_non_finite_entropy_is_refused_and_changes_nothing(kind: str, signal: float) -> None:
    controller = KINDS[kind]()
    controller.update(0.3)
    before = controller.state_dict()
    with pytest.raises(RLVRError, match=f"entropy of step 1 is {signal}"):
        controller.update(signal)
    assert controller.state_dict() == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_or_partial_state_is_refused(kind: str) -> None:
    controller = KINDS[kind]()
    own = controller.state_dict()
    for other in KINDS:
        if other != kind:
            with pytest.raises(RLVRError, match=f"needs {kind}"):
                controller.load_state_dict(KINDS[other]().state_dict())
    del own["steps"]
    with pytest.raises(RLVRError, match="lacks steps"):
        controller.load_state_dict(own)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EntropyGuided(target=-0.1), "target is -0.1"),
        (lambda: EntropyGuided(target=math.nan), "target is nan"),
        (lambda: EntropyGuided(step_size=0.0), "step_size is 0.0"),
        (lambda: EntropyGuided(step_size=math.nan), "step_size is nan"),
        (lambda: EntropyGuided(initial=1.1), "initial is 1.1"),
        (lambda: StageBased(0), "total_steps is 0"),
        (lambda: EpochWise(epochs=2, steps_per_epoch=0), "steps_per_epoch is 0"),
        (lambda: EpochWise(epochs=1, steps_per_epoch=5), "at least two epochs"),
    ],
)
def test_bad_settings_are_refused_in_words(build: Callable[[], Controller], message: str) -> None:
    with pytest.raises(RLVRError, match=message):
        build()


def test_mean_entropy_is_a_ratio_and_needs_tokens() -> None:
    assert mean_entropy(3.0, 12) == 0.25
    with pytest.raises(RLVRError, match="covers 0 response tokens"):
        mean_entropy(0.0, 0)


def test_the_sequence_mean_is_over_rows_with_tokens() -> None:
    # rows of 2, 0 and 4 tokens: (1/2 + 2/4) / 2, where the token mean is 3/6
    total, rows = sequence_sums(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([2, 0, 4]))
    assert (total, rows) == (1.0, 2)
    assert mean_entropy(total, rows) == 0.5
    # a split over ranks adds up to the same sums
    assert sequence_sums(torch.tensor([1.0]), torch.tensor([2])) == (0.5, 1)
    assert sequence_sums(torch.zeros(0), torch.zeros(0)) == (0.0, 0)
