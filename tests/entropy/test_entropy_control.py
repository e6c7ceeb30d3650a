"""The decision of a step: timing, smoothing, actuators, saturation, alarm, fallback, resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy.actuation import ACTUATORS, Actuation, actuate, combine
from megatron_rlvr.entropy.control import EntropyControl, Fallback
from megatron_rlvr.entropy.controllers import Constant, Linear
from megatron_rlvr.entropy.feedback import (
    AdaptiveCoefficient,
    BangBang,
    EntropyGuided,
    Gate,
    Multiplicative,
    ProportionalIntegral,
)
from megatron_rlvr.entropy.targets import Target


def par(step_size: float = 0.5, initial: float = 0.0, **options: object) -> EntropyControl:
    """Eq. 5 on the positive weight with target 0.2."""
    controller = EntropyGuided(target=0.2, step_size=step_size, initial=initial)
    return EntropyControl(controller, "positive_weight", immediate=False, **options)  # type: ignore[arg-type]


def bonus(after: int) -> Fallback:
    """Ada-Ent-Reg with a step of 0.1 after so many held steps."""
    return Fallback(AdaptiveCoefficient(0.2, step_size=0.1, high=0.3), "bonus", after=after)


# --- actuators


@pytest.mark.parametrize(
    ("actuator", "value", "expected"),
    [
        ("positive_weight", 0.3, Actuation(positive_weight=0.3)),
        ("negative_weight", 0.3, Actuation(negative_weight=0.3)),
        ("sign_balance", -1.0, Actuation(positive_weight=0.0)),
        ("sign_balance", -0.25, Actuation(positive_weight=0.75)),
        ("sign_balance", 0.0, Actuation()),
        ("sign_balance", 0.25, Actuation(negative_weight=0.75)),
        ("sign_balance", 1.0, Actuation(negative_weight=0.0)),
        ("bonus", -0.01, Actuation(bonus=-0.01)),
        ("clip_low", 0.2, Actuation(clip_low=0.2)),
        ("clip_high", 0.28, Actuation(clip_high=0.28)),
        ("temperature", 1.2, Actuation(temperature=1.2)),
        ("gain", -0.5, Actuation(gain=-0.5)),
    ],
)
def test_actuators(actuator: str, value: float, expected: Actuation) -> None:
    assert actuate(actuator, value) == expected


def test_every_actuator_is_tested_above_and_others_are_refused() -> None:
    assert len(ACTUATORS) == 8
    with pytest.raises(RLVRError, match=r"actuator 'sign_balanse' is unknown; use 'sign_balance' or another"):
        actuate("sign_balanse", 0.0)
    for actuator, value in {"positive_weight": -0.1, "sign_balance": 1.1, "clip_low": 1.1, "temperature": 0.0}.items():
        with pytest.raises(RLVRError, match=rf"gives {actuator} the value {value:g} but it must be"):
            actuate(actuator, value)
    with pytest.raises(RLVRError, match="clip_high the value nan"):
        actuate("clip_high", math.nan)


def test_combining_multiplies_weights_adds_bonuses_and_lets_the_second_prevail() -> None:
    first = Actuation(0.5, 0.8, bonus=0.1, clip_low=0.2, clip_high=0.3, gain=0.1)
    second = Actuation(0.5, 0.5, bonus=0.2, clip_high=0.4, temperature=1.1, gain=0.2)
    assert combine(first, second) == Actuation(0.25, 0.4, 0.1 + 0.2, 0.2, 0.4, 1.1, 0.1 + 0.2)
    assert combine(first, Actuation()) == combine(Actuation(), first) == first


# --- when a decision takes effect


def test_equation_5_takes_effect_one_step_later_and_a_gate_at_once() -> None:
    signals = [0.3, 0.3, 0.1, 0.1]
    delayed = par()
    assert [delayed.decide(signal).positive_weight for signal in signals] == [0.0, 0.5, 1.0, 0.5]
    assert (delayed.value, delayed.controller.value, delayed.target) == (0.5, 0.0, 0.2)
    gate = EntropyControl(Gate(0.2, on=0.1), "gain", immediate=True)
    assert [gate.decide(signal).gain for signal in signals] == [0.0, 0.0, 0.1, 0.1]
    # Ada-Ent-Reg: alpha_k = c_k 1[H_k <= 0.2] with c = 0, 0, 0, 0.1 in these steps
    adaptive = EntropyControl(AdaptiveCoefficient(0.2, step_size=0.1), "bonus", immediate=True)
    assert [adaptive.decide(signal).bonus for signal in signals] == [0.0, 0.0, 0.0, 0.1]
    assert adaptive.decide(0.3).bonus == 0.0


def test_a_schedule_starts_at_its_first_value() -> None:
    control = EntropyControl(Linear(1.0, 0.0, 3), "negative_weight", immediate=False)
    assert [control.decide(0.3).negative_weight for _ in range(4)] == [1.0, 0.5, 0.0, 0.0]
    assert (control.target, control.alarm, control.fallback_value) == (None, None, 0.0)


@pytest.mark.parametrize("immediate", [False, True])
def test_the_policy_signal_moves_the_step_that_is_told_of_it_and_not_the_first(
    immediate: bool,
) -> None:
    controller = EntropyGuided(initial=0.5, step_size=0.25)
    control = EntropyControl(controller, "positive_weight", immediate=immediate, signal="policy")
    assert control.decide(None).positive_weight == 0.5
    assert controller.steps == 0
    # Eq. 5: H_0, told in step 1, makes lambda_1
    assert [control.decide(0.3).positive_weight for _ in range(2)] == [0.75, 1.0]


def test_a_schedule_keeps_its_clock_under_the_policy_signal() -> None:
    control = EntropyControl(Linear(1.0, 0.0, 3), "negative_weight", immediate=False, signal="policy")
    assert [control.decide(signal).negative_weight for signal in (None, 0.3, 0.3)] == [1.0, 0.5, 0.0]


def test_under_the_policy_signal_a_temperature_is_the_one_that_was_sampled_with() -> None:
    controller = ProportionalIntegral(0.5, kp=1.0, ki=0.0, low=0.5, high=1.5, bias=1.0, direction=-1)
    control = EntropyControl(controller, "temperature", immediate=False, signal="policy")
    for signal in (None, 0.25, 0.5):
        sampled_with = control.next_temperature(0.9)
        assert control.decide(signal).temperature == sampled_with
    assert sampled_with == 1.25


def test_the_next_rollout_samples_with_the_newest_temperature() -> None:
    control = EntropyControl(
        ProportionalIntegral(0.5, kp=1.0, ki=0.0, low=0.5, high=1.5, bias=1.0, direction=-1),
        "temperature",
        immediate=False,
    )
    assert control.next_temperature(0.9) == 1.0
    assert control.decide(0.25).temperature == 1.0
    assert control.next_temperature(0.9) == 1.25
    assert par().next_temperature(0.9) == 0.9


def test_the_controller_sees_the_smoothed_entropy() -> None:
    # 1.0, 0.5 * 0.0 + 0.5 * 1.0 = 0.5, 0.25 * … : the error of the proportional controller is the smoothed signal
    controller = ProportionalIntegral(0.0, kp=1.0, ki=0.0, low=-2.0, high=2.0)
    control = EntropyControl(controller, "gain", immediate=True, ema=0.5)
    assert [control.decide(signal).gain for signal in (1.0, 0.0, 0.0, 1.0)] == [1.0, 0.5, 0.25, 0.625]
    paper = EntropyControl(
        ProportionalIntegral(0.0, kp=1.0, ki=0.0, low=-2.0, high=2.0), "gain", immediate=True, ema=0.6
    )
    assert [paper.decide(signal).gain for signal in (1.0, 0.5)] == pytest.approx([1.0, 0.4 * 0.5 + 0.6])


def test_a_target_that_is_a_share_follows_the_first_signal() -> None:
    control = EntropyControl(Gate(Target.parse("50%", 9), on=1.0), "gain", immediate=True)
    assert control.target is None
    assert [control.decide(signal).gain for signal in (0.8, 0.5, 0.3)] == [0.0, 0.0, 1.0]
    assert control.target == 0.4
    band = EntropyControl(BangBang(0.25, 0.75), "sign_balance", immediate=True)
    assert band.target == 0.5
    assert [band.decide(signal) for signal in (0.1, 0.5, 0.9)] == [
        *(Actuation(positive_weight=0.0), Actuation(), Actuation(negative_weight=0.0))
    ]


# --- saturation


def test_saturated_steps_are_those_with_the_bound_in_force() -> None:
    delayed = par()
    for signal in (0.3, 0.3, 0.3, 0.1):  # in force: 0, 0.5, 1, 1
        delayed.decide(signal)
    assert (delayed.saturated_low, delayed.saturated_high) == (1, 2)
    gate = EntropyControl(Gate(0.2, on=0.1), "gain", immediate=True)
    for signal in (0.1, 0.1, 0.3):
        gate.decide(signal)
    assert (gate.saturated_low, gate.saturated_high) == (1, 2)
    constant = EntropyControl(Constant(1.0), "positive_weight", immediate=False)
    constant.decide(0.3)
    assert (constant.saturated_low, constant.saturated_high) == (0, 0)


def test_the_alarm_speaks_after_so_many_held_steps_in_a_row_and_falls_silent() -> None:
    control = par(alarm_after=3)
    for signal in (0.1, 0.1):
        control.decide(signal)
        assert control.alarm is None
    control.decide(0.2)  # at the target: the row ends
    assert control.alarm is None
    assert control.decide(0.1).positive_weight == 0.5  # not at a bound, then twice at it
    for signal in (0.12, 0.11):
        control.decide(signal)
        assert control.alarm is None
    control.decide(0.0512345)
    assert control.alarm == (
        "positive_weight has been at its lower bound 0 for 3 steps with the entropy, now 0.05123, below the target "
        "0.2, so it can do no more: lower the target or the learning rate, take fewer updates per rollout, or add a "
        "fallback bonus"
    )
    control.decide(0.3)
    assert control.alarm is None


def test_the_alarm_names_the_other_side_too() -> None:
    control = EntropyControl(BangBang(0.25, 0.75), "sign_balance", immediate=True, alarm_after=2)
    control.decide(0.1)
    control.decide(0.9)
    assert control.alarm is None, "one step on each side is no row"
    control.decide(0.9)
    assert control.alarm == (
        "sign_balance has been at its upper bound 1 for 2 steps with the entropy, now 0.9, above the target 0.75, so "
        "it can do no more: raise the target or choose a recipe that can lower entropy, unless it is falling by itself"
    )


def test_a_bound_on_the_satisfied_side_is_no_saturation() -> None:
    control = par(initial=1.0, alarm_after=1)
    control.decide(0.1)  # 1 in force, the entropy below: the controller is on its way down
    assert control.alarm is None
    rising = EntropyControl(Multiplicative(0.2, initial=0.5, low=0.25, high=1.0), "gain", immediate=True, alarm_after=1)
    rising.decide(0.1)
    assert (rising.value, rising.alarm is None) == (1.0, False)
    falling = EntropyControl(
        Multiplicative(0.2, initial=1.0, low=0.25, high=1.0), "gain", immediate=False, alarm_after=1
    )
    falling.decide(0.3)
    assert (falling.value, falling.alarm) == (1.0, None)


# --- fallback


def test_the_fallback_engages_and_disengages_exactly_when_stated() -> None:
    control = par(fallback=bonus(after=2), alarm_after=4)
    rows = [
        # H, positive weight, bonus, fallback's c after the step
        (0.1, 0.0, 0.0),  # held 1
        (0.1, 0.0, 0.0),  # held 2: engaged, bonus = c = 0, c -> 0.1
        (0.1, 0.0, 0.1),  # c -> 0.2
        (0.1, 0.0, 0.2),  # c -> 0.3, held 4: alarm
        (0.3, 0.0, 0.0),  # gate closed, not held: rested 1, c -> 0.2
        (0.1, 0.5, 0.2),  # one step of rest is not enough, c -> 0.3
        (0.3, 0.0, 0.0),  # rested 1, c -> 0.2
        (0.3, 0.5, 0.0),  # rested 2: disengaged, c -> 0.1
        (0.3, 1.0, 0.0),
        (0.1, 1.0, 0.0),
        (0.1, 0.5, 0.0),
        (0.1, 0.0, 0.0),  # held 1; a c of 0.1 does nothing while disengaged
        (0.1, 0.0, 0.1),  # held 2: engaged again, from where it was, c -> 0.2
        (0.3, 0.0, 0.0),  # rested 1 of 2 again
        (0.1, 0.5, 0.1),  # still engaged
    ]
    alarms = []
    for signal, weight, coefficient in rows:
        assert control.decide(signal) == Actuation(positive_weight=weight, bonus=coefficient)
        assert control.fallback_value == coefficient
        alarms.append(control.alarm is not None)
    assert alarms == [step == 3 for step in range(len(rows))]


def test_the_alarm_tells_of_the_fallback() -> None:
    control = par(fallback=bonus(after=1), alarm_after=3)
    for _ in range(3):
        control.decide(0.1)
    assert control.alarm is not None
    assert control.alarm.endswith(
        "so it can do no more: the fallback's bonus is 0.2; lower the target or the learning rate, take fewer updates "
        "per rollout, or raise the fallback's bound"
    )


def test_the_alarm_of_a_bonus_asks_for_no_fallback_which_it_cannot_have() -> None:
    control = EntropyControl(AdaptiveCoefficient(0.2, step_size=0.1, high=0.1), "bonus", immediate=True, alarm_after=1)
    control.decide(0.1)
    control.decide(0.1)
    assert control.alarm is not None
    assert control.alarm.endswith("take fewer updates per rollout, or raise its bound")


def test_entropy_above_the_target_engages_no_fallback() -> None:
    control = par(initial=1.0, fallback=bonus(after=2))
    for _ in range(5):
        assert control.decide(0.3) == Actuation(positive_weight=1.0)
        assert control.state_dict()["engaged"] is False


def test_a_fallback_that_waits_knows_the_first_signal_and_the_step() -> None:
    control = EntropyControl(
        EntropyGuided(target=Target.parse("100% -> 50%", 5), step_size=0.5),
        "positive_weight",
        immediate=False,
        fallback=Fallback(Gate(Target.parse("100% -> 50%", 5), on=0.1), "bonus", after=3),
    )
    # targets 0.8, 0.7, 0.6, 0.5, 0.4: up in step 0, then always below the target
    bonuses = [control.decide(signal).bonus for signal in (0.8, 0.6, 0.5, 0.4, 0.3)]
    # weights in force: 0, 0.5, 0, 0, 0: held in steps 2, 3, 4
    assert bonuses == [0.0, 0.0, 0.0, 0.0, 0.1]
    assert control._fallback is not None
    assert control._fallback.controller.band == control.controller.band == (0.4, 0.4)


def test_the_fallback_holds_a_target_that_the_positive_weight_cannot() -> None:
    """A plant that loses 0.02 nats a step at λ = 0 and 0.06 at λ = 1, and gains twice the bonus."""

    def last_entropies(control: EntropyControl) -> list[float]:
        entropy, course = 0.5, []
        for _ in range(300):
            step = control.decide(entropy)
            entropy = max(0.0, entropy - 0.02 - 0.04 * step.positive_weight + 2.0 * step.bonus)
            course.append(entropy)
        return course[-100:]

    alone = par(step_size=0.05)
    assert last_entropies(alone)[-1] == 0.0
    assert alone.alarm is not None
    helped = last_entropies(
        par(step_size=0.05, fallback=Fallback(AdaptiveCoefficient(0.2, step_size=0.005), "bonus", after=5))
    )
    assert sum(helped) / len(helped) == pytest.approx(0.2, abs=0.05)
    assert min(helped) > 0.05


# --- resume


CONTROLS: dict[str, Callable[[], EntropyControl]] = {
    "par": lambda: par(step_size=0.3, ema=0.6, fallback=bonus(after=2), alarm_after=3),
    "entropic": lambda: EntropyControl(
        ProportionalIntegral(Target.parse("40%", 9), kp=1.0, ki=0.01, low=-1.0, high=1.0, anti_windup=False),
        "sign_balance",
        immediate=True,
        ema=0.1,
    ),
    "stare": lambda: EntropyControl(Gate(0.3, on=0.1), "gain", immediate=True, signal="sequence", alarm_after=2),
}


@pytest.mark.parametrize("recipe", CONTROLS)
@settings(max_examples=60)
@given(signals=st.lists(st.floats(0.0, 0.5), min_size=1, max_size=30), cut=st.integers(0, 30))
def test_resuming_continues_bit_for_bit(recipe: str, signals: list[float], cut: int) -> None:
    def decisions(control: EntropyControl, signals: list[float]) -> list[object]:
        return [
            (control.decide(signal), control.alarm, control.target, control.fallback_value, control.value)
            for signal in signals
        ]

    uninterrupted, first, second = (CONTROLS[recipe]() for _ in range(3))
    whole = decisions(uninterrupted, signals)
    parts = decisions(first, signals[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.alarm, second.value, second.fallback_value) == (first.alarm, first.value, first.fallback_value)
    assert parts + decisions(second, signals[cut:]) == whole
    assert second.state_dict() == uninterrupted.state_dict()


@pytest.mark.parametrize("recipe", CONTROLS)
@pytest.mark.parametrize("signal", [math.nan, math.inf])
def test_non_finite_entropy_is_refused_and_changes_nothing(recipe: str, signal: float) -> None:
    control = CONTROLS[recipe]()
    for _ in range(4):
        before = control.state_dict()
        with pytest.raises(RLVRError, match=f"is {signal}, which cannot steer"):
            control.decide(signal)
        assert control.state_dict() == before
        control.decide(0.1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: EntropyControl(EntropyGuided(), "bonus", immediate=False),
            "has actuator bonus but .* positive_weight",
        ),
        (lambda: EntropyControl(EntropyGuided(), "positive_weight", immediate=True), "has immediate True but .* False"),
        (lambda: par(signal="sequence"), "has signal sequence but .* rollout"),
        (lambda: par(fallback=bonus(2)), "has fallback bonus but .* None"),
        (
            lambda: EntropyControl(Constant(1.0), "positive_weight", immediate=False),
            "state of a constant controller but this run's recipe needs entropy_guided",
        ),
    ],
)
def test_the_state_of_another_recipe_is_refused(other: Callable[[], EntropyControl], message: str) -> None:
    with pytest.raises(RLVRError, match=message):
        par().load_state_dict(other().state_dict())


def test_a_partial_state_is_refused() -> None:
    state = par().state_dict()
    del state["held"]
    with pytest.raises(RLVRError, match="entropy control lacks held"):
        par().load_state_dict(state)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: par(ema=1.0), r"ema is 1.0 but must lie in \[0, 1\)"),
        (lambda: par(alarm_after=0), "at least 1"),
        (lambda: par(fallback=bonus(after=0)), "at least 1"),
        (lambda: EntropyControl(EntropyGuided(high=1.5), "sign_balance", immediate=True), "sign_balance the value 1.5"),
        (lambda: EntropyControl(Constant(0.0), "temperature", immediate=False), "temperature the value 0"),
        (
            lambda: par(fallback=Fallback(EntropyGuided(), "positive_weight")),
            "the fallback acts on positive_weight, which does something at 0",
        ),
    ],
)
def test_bad_settings_are_refused_in_words(build: Callable[[], EntropyControl], message: str) -> None:
    with pytest.raises(RLVRError, match=message):
        build()
