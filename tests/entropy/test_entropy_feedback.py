"""Controllers with feedback: hand-computed sequences, bounds, direction, resume bit for bit, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy.feedback import (
    AdaptiveCoefficient,
    BangBang,
    EntropyGuided,
    Feedback,
    Gate,
    Multiplicative,
    ProportionalIntegral,
)
from megatron_rlvr.entropy.targets import Target

STEPS = 30
COURSE = "120% ~> 0.4"
KINDS: dict[str, Callable[[], Feedback]] = {
    "entropy_guided": lambda: EntropyGuided(target=moving(), step_size=0.07, initial=0.3, low=0.1, high=0.9),
    "adaptive_coefficient": lambda: AdaptiveCoefficient(moving(), step_size=0.03, high=0.1, initial=0.05),
    "proportional_integral": lambda: ProportionalIntegral(moving(), kp=0.7, ki=0.3, low=-1, high=1, deadband=0.01),
    "winding": lambda: ProportionalIntegral(
        moving(), kp=1, ki=0.1, low=0.0, high=0.3, bias=0.1, direction=-1, anti_windup=False
    ),
    "gate": lambda: Gate(moving(), on=0.1),
    "bang_bang": lambda: BangBang(Target.parse("60%", STEPS), Target.parse("100% -> 70%", STEPS)),
    "multiplicative": lambda: Multiplicative(moving(), initial=0.01, low=1e-3, high=0.5, factor=1.7),
}


def moving() -> Target:
    """A target with state and a clock."""
    return Target.parse(COURSE, STEPS)


def after_each(controller: Feedback, signals: Sequence[float]) -> list[float]:
    """The value that each update returns."""
    values = []
    for signal in signals:
        values.append(controller.update(signal))
        assert values[-1] == controller.value
    return values


def test_entropy_guided_follows_a_target_that_moves_and_keeps_its_own_bounds() -> None:
    guided = EntropyGuided(target=Target.parse("100% -> 50%", 3), step_size=0.1, initial=0.5, low=0.4, high=0.6)
    # targets 0.8, 0.6, 0.4, 0.4: up (not below), down, up, up, and up again against the bound
    assert after_each(guided, [0.8, 0.5, 0.5, 0.5, 0.5]) == [0.6, 0.5, 0.6, 0.6, 0.6]
    assert guided.band == (0.4, 0.4)


def test_adaptive_coefficient_is_gated_and_moves_behind_its_gate() -> None:
    adaptive = AdaptiveCoefficient(0.2, step_size=0.1, high=0.3)
    #   H      c before   value = c·1[H <= 0.2]   c after
    rows = [
        (0.1, 0.0, 0.1),
        (0.1, 0.1, 0.2),
        (0.1, 0.2, 0.3),
        (0.1, 0.3, 0.3),  # at the limit
        (0.5, 0.0, 0.2),  # gate closed, c still moves
        (0.5, 0.0, 0.1),
        (0.1, 0.1, 0.2),
        (0.2, 0.2, 0.1),  # at the target: open, and down
        (0.5, 0.0, 0.0),
        (0.5, 0.0, 0.0),  # c rests at 0 …
        (0.1, 0.0, 0.1),
        (0.1, 0.1, 0.2),  # … and leaves it
    ]
    for signal, value, coefficient in rows:
        assert adaptive.update(signal) == value
        assert float(adaptive._coefficient) == coefficient


def test_proportional_integral_by_hand_and_in_both_directions() -> None:
    # e = H - 0.5 = 0.25, 0.5, -0.25; sums 0.25, 0.75, 0.5; 0.5 e + 0.25 sum = 0.1875, 0.4375, 0
    signals, expected = [0.75, 1.0, 0.25], [0.1875, 0.4375, 0.0]
    for direction in (1, -1):
        controller = ProportionalIntegral(0.5, kp=0.5, ki=0.25, low=-1.0, high=1.0, bias=0.125, direction=direction)
        assert controller.value == 0.125
        assert after_each(controller, signals) == [0.125 + direction * value for value in expected]


def test_entropic_is_one_setting_of_it() -> None:
    # errors -0.0625 each: value -0.0625 * (1 + 0.01 k) in the k-th step; an error of 3 is clipped to 1
    controller = ProportionalIntegral(0.125, kp=1.0, ki=0.01, low=-1.0, high=1.0, anti_windup=False)
    assert after_each(controller, [0.0625] * 3) == pytest.approx([-0.063125, -0.06375, -0.064375], abs=1e-15)
    assert controller.update(3.125) == 1.0


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize(("anti_windup", "recovery"), [(True, 2), (False, 22)])
def test_anti_windup_turns_back_with_the_error(anti_windup: bool, recovery: int, direction: int) -> None:
    # Errors of +0.5 with ki 0.5 reach the bound 1 in four steps (sum 2). Twenty more errors of +0.5 leave the sum at 2
    # or wind it up to 12. Errors of -0.5 then bring the value below 0.75 (sum below 1.5) in 2 or 22 steps.
    controller = ProportionalIntegral(
        0.5, kp=0.0, ki=0.5, low=0.0, high=1.0, direction=direction, anti_windup=anti_windup
    )
    assert after_each(controller, [0.5 + 0.5 * direction] * 24) == [0.25, 0.5, 0.75, *[1.0] * 21]
    back = after_each(controller, [0.5 - 0.5 * direction] * recovery)
    assert min(back[:-1]) >= 0.75 > back[-1]


def test_an_integral_that_would_overshoot_still_reaches_its_bound() -> None:
    controller = ProportionalIntegral(0.5, kp=0.0, ki=1.0, low=0.0, high=0.75)
    assert after_each(controller, [1.0, 1.0, 1.0, 0.25]) == [0.5, 0.75, 0.75, 0.25]


def test_errors_within_the_deadband_move_nothing() -> None:
    controller = ProportionalIntegral(0.5, kp=1.0, ki=0.5, low=-1.0, high=1.0, deadband=0.125)
    # 0.25 counts: 0.25 + 0.5 * 0.25; then only the sum remains; 0.1875 counts again: 0.1875 + 0.5 * 0.4375
    assert after_each(controller, [0.75, 0.625, 0.375, 0.5, 0.6875]) == [0.375, 0.125, 0.125, 0.125, 0.40625]
    assert controller.band == (0.375, 0.625)


def test_gate_opens_below_the_target() -> None:
    assert after_each(Gate(0.3, on=0.1), [0.3, 0.29, 0.31]) == [0.0, 0.1, 0.0]
    closing = Gate(0.3, on=0.2, off=0.28)
    assert (closing.value, closing.bounds, closing.direction) == (0.28, (0.2, 0.28), 1)


def test_bang_bang_in_a_moving_band() -> None:
    controller = BangBang(Target.parse("0.6 -> 0.4", 3), Target.parse("0.7 -> 0.5", 3))
    # bands [.6, .7], [.5, .6], [.4, .5] from then on; both edges belong to the band
    assert after_each(controller, [0.55, 0.55, 0.55, 0.5, 0.4]) == [-1.0, 0.0, 1.0, 0.0, 0.0]
    assert controller.band == (0.4, 0.5)


def test_multiplicative_doubles_and_halves_within_bounds() -> None:
    controller = Multiplicative(0.5, initial=0.25, low=0.125, high=0.75)
    assert after_each(controller, [0.4, 0.4, 0.5, 0.6, 0.6, 0.6]) == [0.5, 0.75, 0.75, 0.375, 0.1875, 0.125]


SIGNALS = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=STEPS)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(signals=SIGNALS)
def test_no_value_leaves_its_bounds(kind: str, signals: list[float]) -> None:
    controller = KINDS[kind]()
    low, high = controller.bounds
    assert low <= controller.value <= high
    assert all(low <= value <= high for value in after_each(controller, signals))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(signals=SIGNALS, one=st.floats(0.0, 2.0), other=st.floats(0.0, 2.0))
def test_more_entropy_never_moves_against_the_direction(
    kind: str, signals: list[float], one: float, other: float
) -> None:
    low, high = KINDS[kind](), KINDS[kind]()
    after_each(low, signals)
    after_each(high, signals)
    values = low.update(min(one, other)), high.update(max(one, other))
    assert (values[1] - values[0]) * low.direction >= 0.0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(signals=SIGNALS, cut=st.integers(0, STEPS))
def test_resuming_continues_bit_for_bit(kind: str, signals: list[float], cut: int) -> None:
    uninterrupted, first, second = (KINDS[kind]() for _ in range(3))
    whole = after_each(uninterrupted, signals)
    parts = after_each(first, signals[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.value == first.value
    assert parts + after_each(second, signals[cut:]) == whole
    assert second.state_dict() == uninterrupted.state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signal", [math.nan, math.inf, -math.inf])
def test_non_finite_entropy_is_refused_and_changes_nothing(kind: str, signal: float) -> None:
    controller = KINDS[kind]()
    for step in range(2):
        before = controller.state_dict()
        with pytest.raises(RLVRError, match=f"entropy of step {step} is {signal}"):
            controller.update(signal)
        assert controller.state_dict() == before
        controller.update(0.5)


def test_waiting_moves_the_clock_and_not_the_value() -> None:
    # course 0.8, 0.6, 0.4 from the first signal 0.8: the update in step 2 compares 0.5 with 0.4, not with 0.8
    controller = Gate(Target.parse("100% -> 50%", 3), on=1.0)
    controller.wait(0.8)
    assert controller.band == (0.8, 0.8)
    controller.wait(0.1)
    assert controller.value == 0.0
    assert controller.update(0.5) == 0.0
    assert controller.band == (0.4, 0.4)


def test_a_share_has_no_band_before_the_first_signal() -> None:
    assert Gate(Target.parse("75%", 1), on=1.0).band is None
    assert Gate(0.3, on=1.0).band == (0.3, 0.3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EntropyGuided(low=0.5, high=0.5), "0.5 and 0.5 but the lower"),
        (lambda: EntropyGuided(initial=0.2, low=0.5), r"initial is 0.2 .* lies in \[0.5, 1\]"),
        (lambda: EntropyGuided(step_size=0.6, low=0.5), r"step_size is 0.6 .* \(0, 0.5\]"),
        (lambda: AdaptiveCoefficient(0.2, high=math.nan), "0.0 and nan"),
        (lambda: AdaptiveCoefficient(-0.2), r"entropy\.target is -0.2"),
        (lambda: ProportionalIntegral(0.2, kp=-1, ki=0, low=0, high=1), "kp is -1"),
        (lambda: ProportionalIntegral(0.2, kp=1, ki=math.inf, low=0, high=1), "ki is inf"),
        (lambda: ProportionalIntegral(0.2, kp=1, ki=0, low=0, high=1, deadband=math.nan), "deadband is nan"),
        (lambda: ProportionalIntegral(0.2, kp=1, ki=0, low=0, high=1, direction=0), "direction is 0"),
        (lambda: Gate(0.2, on=0.0), "0.0 and 0.0"),
        (lambda: BangBang(0.3, 0.2), "lower edge is 0.3 but its upper 0.2"),
        (lambda: Multiplicative(0.2, initial=0.0, low=0.0, high=1.0), "low is 0.0"),
        (lambda: Multiplicative(0.2, initial=0.5, low=0.1, high=1.0, factor=1.0), "factor 1.0"),
        (lambda: Multiplicative(0.2, initial=2.0, low=0.1, high=1.0), "initial is 2.0"),
    ],
)
def test_bad_settings_are_refused_in_words(build: Callable[[], Feedback], message: str) -> None:
    with pytest.raises(RLVRError, match=message):
        build()


def test_a_state_outside_the_bounds_is_refused() -> None:
    state = EntropyGuided(initial=0.9).state_dict()
    with pytest.raises(RLVRError, match=r"stands at 0.9 but this run's recipe holds it in \[0, 0.5\]"):
        EntropyGuided(high=0.5).load_state_dict(state)
