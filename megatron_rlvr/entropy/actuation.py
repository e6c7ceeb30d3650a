"""Actuators: what a controller's value does to the updates and to the next rollout."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_rlvr.core import RLVRError


@dataclass(frozen=True, slots=True)
class Actuation:
    """Everything that entropy control sets in one step; the defaults set nothing. None leaves the run's own setting.

    Attributes:
        positive_weight: Multiplies the loss of tokens with positive advantage (λ).
        negative_weight: Multiplies the loss of tokens with negative advantage.
        bonus: Coefficient of the entropy that is added to the objective (α).
        clip_low: How far the ratio may fall below 1 before it is clipped.
        clip_high: How far it may rise above 1.
        temperature: What the rollout samples with.
        gain: Strength handed to the recipe's token rule.
    """

    positive_weight: float = 1.0
    negative_weight: float = 1.0
    bonus: float = 0.0
    clip_low: float | None = None
    clip_high: float | None = None
    temperature: float | None = None
    gain: float = 0.0


def _positive_weight(value: float) -> Actuation:
    return Actuation(positive_weight=_within("positive_weight", value, 0.0, math.inf))


def _sign_balance(value: float) -> Actuation:
    """-1 leaves the negatives only, 0 both, 1 the positives only."""
    value = _within("sign_balance", value, -1.0, 1.0)
    return Actuation(positive_weight=1.0 + min(value, 0.0), negative_weight=1.0 - max(value, 0.0))


def _clip_low(value: float) -> Actuation:
    return Actuation(clip_low=_within("clip_low", value, 0.0, 1.0))


def _clip_high(value: float) -> Actuation:
    return Actuation(clip_high=_within("clip_high", value, 0.0, math.inf))


def _temperature(value: float) -> Actuation:
    return Actuation(temperature=_within("temperature", value, math.ulp(0.0), math.inf))


def _within(actuator: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        least = "above 0" if actuator == "temperature" else f"in [{low:g}, {high:g}]"
        raise RLVRError(f"a controller gives {actuator} the value {value:g} but it must be {least}; change its bounds")
    return value


ACTUATORS: dict[str, Callable[[float], Actuation]] = {
    "positive_weight": _positive_weight,
    "negative_weight": lambda value: Actuation(negative_weight=_within("negative_weight", value, 0.0, math.inf)),
    "sign_balance": _sign_balance,
    "bonus": lambda value: Actuation(bonus=value),
    "clip_low": _clip_low,
    "clip_high": _clip_high,
    "temperature": _temperature,
    "gain": lambda value: Actuation(gain=value),
}
"""Actuators by name: from a controller's value to what the step does."""


def actuate(actuator: str, value: float) -> Actuation:
    """What ``value`` means to the actuator of that name, a key of ``ACTUATORS``.

    Raises:
        RLVRError: If there is no such actuator or it cannot take the value.
    """
    if actuator not in ACTUATORS:
        nearest = difflib.get_close_matches(actuator, ACTUATORS, n=1, cutoff=0.0)[0]
        raise RLVRError(f"actuator {actuator!r} is unknown; use {nearest!r} or another of {', '.join(ACTUATORS)}")
    return ACTUATORS[actuator](value)


def combine(first: Actuation, second: Actuation) -> Actuation:
    """Both at once: weights multiply, the bonus and gain add up, and what ``second`` sets otherwise prevails."""
    return Actuation(
        positive_weight=first.positive_weight * second.positive_weight,
        negative_weight=first.negative_weight * second.negative_weight,
        bonus=first.bonus + second.bonus,
        clip_low=first.clip_low if second.clip_low is None else second.clip_low,
        clip_high=first.clip_high if second.clip_high is None else second.clip_high,
        temperature=first.temperature if second.temperature is None else second.temperature,
        gain=first.gain + second.gain,
    )
