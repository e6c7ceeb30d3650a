"""Entropy control of a run: one decision per step, from the step's entropy to what its updates do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy.actuation import Actuation, actuate, combine
from megatron_rlvr.entropy.controllers import Controller, State
from megatron_rlvr.entropy.feedback import Feedback
from megatron_rlvr.entropy.signal import SignalKind


@dataclass(frozen=True, slots=True)
class Fallback:
    """A second controller that joins when the first can do no more against falling entropy.

    Attributes:
        controller: Updated in every step while engaged; otherwise only its target's clock moves on.
        actuator: What its value does; 0 must do nothing.
        after: It engages after so many steps in a row in which the first controller is held at a bound with the entropy
            below the target, and disengages after as many in a row in which that is over and its own value is 0. Less
            patience would drop a coefficient whose gate closed for one step.
    """

    controller: Feedback
    actuator: str
    after: int = 20


class EntropyControl:
    """A controller, what its value does, and what happens when that is not enough.

    The controller is *held* in a step if the value in force is at a bound and the entropy lies on the side of the
    target on which the controller would go further. Held below the target long enough, the ``fallback`` joins; there is
    none for the other side, because a bonus cannot lower entropy.

    Attributes:
        controller: The first controller.
        signal: Which entropy ``decide`` is to be given.
        value: The first controller's value in force; before the first decision, its value then.
        saturated_low: Decided steps in which that was the lower bound.
        saturated_high: Decided steps in which that was the upper bound.
    """

    def __init__(
        self,
        controller: Controller,
        actuator: str,
        *,
        immediate: bool,
        signal: SignalKind = "rollout",
        ema: float = 0.0,
        fallback: Fallback | None = None,
        alarm_after: int = 20,
    ) -> None:
        """Control by ``controller``.

        Args:
            controller: Turns entropy into a value.
            actuator: What the value does, a key of ``ACTUATORS``.
            immediate: Whether a step's entropy moves the value of that step (gates, Ada-Ent-Reg, EntroPIC, Entrocraft,
                STARE) or of the next one (Eq. 5 of PAR, and schedules, which would skip their first value). The signal
                ``policy`` comes one step late already, so there it moves the value of the step that is told of it,
                unless that is a temperature, which has been sampled with by then.
            signal: Which entropy ``decide`` is to be given.
            ema: Share of the previous smoothed entropy in the one that the controller sees; PAR's tables use 0.6.
            fallback: What joins when the controller is held with the entropy below the target.
            alarm_after: Held steps in a row after which ``alarm`` speaks.

        Raises:
            RLVRError: If an actuator is unknown, cannot take a controller's bounds, does something at 0 although it
                is the fallback's, or a number is out of range.
        """
        if not 0.0 <= ema < 1.0:
            raise RLVRError(f"ema is {ema} but must lie in [0, 1), the share of the past in the smoothed entropy")
        if alarm_after < 1 or (fallback is not None and fallback.after < 1):
            raise RLVRError("alarm_after and the fallback's after count held steps and must be at least 1")
        for bound in controller.bounds or (controller.value,):
            actuate(actuator, bound)
        if fallback is not None:
            for bound in fallback.controller.bounds:
                actuate(fallback.actuator, bound)
            if actuate(fallback.actuator, 0.0) != Actuation():
                raise RLVRError(
                    f"the fallback acts on {fallback.actuator}, which does something at 0; use bonus or gain"
                )
        self.controller, self.signal = controller, signal
        self._actuator, self._ema = actuator, ema
        self._immediate = immediate or (signal == "policy" and actuator != "temperature")
        self._fallback, self._alarm_after = fallback, alarm_after
        self.value = controller.value
        self.saturated_low = self.saturated_high = 0
        self._smoothed: float | None = None
        self._held = 0  # steps in a row; negative with the entropy below the target, positive above
        self._engaged = False
        self._rested = 0  # steps in a row in which an engaged fallback was not needed

    @property
    def target(self) -> float | None:
        """The entropy (nats) that the last decision aimed at, the middle of a band; None while there is none."""
        band = self.controller.band
        return None if band is None else (band[0] + band[1]) / 2.0

    @property
    def smoothed(self) -> float | None:
        """The entropy (nats) that the controller last saw, after ``ema``; None before the first."""
        return self._smoothed

    @property
    def fallback_value(self) -> float:
        """The value of the fallback, 0 while it is not engaged."""
        return self._fallback.controller.value if self._fallback is not None and self._engaged else 0.0

    @property
    def alarm(self) -> str | None:
        """A sentence if the controller has been held for ``alarm_after`` steps in a row up to now, else None."""
        bounds, band = self.controller.bounds, self.controller.band
        if abs(self._held) < self._alarm_after or bounds is None or band is None:
            return None
        bound = "lower" if self.value == bounds[0] else "upper"
        side, edge = ("below", band[0]) if self._held < 0 else ("above", band[1])
        if self._held > 0:
            mend = "raise the target or choose a recipe that can lower entropy, unless it is falling by itself"
        else:
            mend = "lower the target or the learning rate, take fewer updates per rollout, or "
            alone = "raise its bound" if self._actuator == "bonus" else "add a fallback bonus"
            mend += alone if self._fallback is None else "raise the fallback's bound"
        if self._fallback is not None:
            mend = f"the fallback's {self._fallback.actuator} is {self.fallback_value:g}; {mend}"
        return (
            f"{self._actuator} has been at its {bound} bound {self.value:g} for {abs(self._held)} steps with the "
            f"entropy, now {self._smoothed:.4g}, {side} the target {edge:.4g}, so it can do no more: {mend}"
        )

    def decide(self, signal: float | None) -> Actuation:
        """What this step's updates do. To be called once per step, before them.

        Args:
            signal: The step's entropy in nats, over all ranks and micro-batches. For the signal ``policy``, which is
                known only after the updates, that of the previous step and None in the first, which moves nothing.

        Raises:
            RLVRError: If ``signal`` is NaN or infinite; nothing has then changed.
        """
        value = self.controller.value
        if signal is not None:
            smoothed = signal if self._smoothed is None else (1.0 - self._ema) * signal + self._ema * self._smoothed
            updated = self.controller.update(smoothed)
            value = updated if self._immediate else value
            self._smoothed = smoothed
            self._held = self._held_steps(value, smoothed)
            self._fall_back(smoothed)
        self.value = value
        if self.controller.bounds is not None:
            self.saturated_low += value == self.controller.bounds[0]
            self.saturated_high += value == self.controller.bounds[1]
        return self._actuation(value)

    def next_temperature(self, default: float) -> float:
        """What the next rollout samples with: the actuators' temperature after the last decision, or ``default``."""
        temperature = self._actuation(self.controller.value).temperature
        return default if temperature is None else temperature

    def _actuation(self, value: float) -> Actuation:
        actuation = actuate(self._actuator, value)
        if self._fallback is None or not self._engaged:
            return actuation
        return combine(actuation, actuate(self._fallback.actuator, self._fallback.controller.value))

    def _held_steps(self, value: float, signal: float) -> int:
        """``_held`` after a step with ``value`` in force."""
        bounds, band = self.controller.bounds, self.controller.band
        if bounds is None or band is None:
            return 0
        side = (signal > band[1]) - (signal < band[0])
        further = side * self.controller.direction
        if side == 0 or value != bounds[further > 0]:
            return 0
        return side + (self._held if self._held * side > 0 else 0)

    def _fall_back(self, signal: float) -> None:
        """Engage, update, or disengage the fallback."""
        fallback = self._fallback
        if fallback is None:
            return
        self._engaged = self._engaged or -self._held >= fallback.after
        if not self._engaged:
            fallback.controller.wait(signal)
            return
        value = fallback.controller.update(signal)
        self._rested = self._rested + 1 if value == 0.0 and self._held >= 0 else 0
        if self._rested == fallback.after:
            self._engaged, self._rested = False, 0

    def state_dict(self) -> State:
        """Everything that a resumed run needs, as JSON values; bit-equal after a round trip."""
        fallback = self._fallback
        return {
            **self._recipe(),
            "controller": self.controller.state_dict(),
            "value": self.value,
            "saturated_low": self.saturated_low,
            "saturated_high": self.saturated_high,
            "smoothed": self._smoothed,
            "held": self._held,
            "engaged": self._engaged,
            "rested": self._rested,
            "fallback_controller": None if fallback is None else fallback.controller.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``.

        Raises:
            RLVRError: If another recipe wrote it or a part of it is missing.
        """
        if missing := self.state_dict().keys() - state.keys():
            raise RLVRError(
                f"the checkpoint's entropy control lacks {', '.join(sorted(missing))}; resume from a checkpoint that "
                "is whole and of this version"
            )
        for name, own in self._recipe().items():
            if state[name] != own:
                raise RLVRError(
                    f"the checkpoint's entropy control has {name} {state[name]} but this run's recipe has {own}; "
                    "resume with the recipe that wrote it or start a new run"
                )
        self.controller.load_state_dict(state["controller"])
        if self._fallback is not None:
            self._fallback.controller.load_state_dict(state["fallback_controller"])
        self.value, self._smoothed = float(state["value"]), state["smoothed"]
        self.saturated_low, self.saturated_high = int(state["saturated_low"]), int(state["saturated_high"])
        self._held, self._engaged, self._rested = int(state["held"]), bool(state["engaged"]), int(state["rested"])

    def _recipe(self) -> dict[str, str | bool | None]:
        """What must not change between saving and resuming, beside the kinds of controllers."""
        return {
            "actuator": self._actuator,
            "immediate": self._immediate,
            "signal": self.signal,
            "fallback": None if self._fallback is None else self._fallback.actuator,
        }
