"""Controllers that steer the entropy to a target: one number goes up or down with the entropy of every step.

Decimals given to step counters are taken at their word and kept as fractions, so that twenty steps of 0.05 are exactly
1, a bound is hit or missed as on paper, and no rounding builds up over a run.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy.controllers import State, Stepped
from megatron_rlvr.entropy.targets import Target, exact


class Feedback(Stepped):
    """What controllers with a target share: the targets' clock, their first signal, and bounds that are checked."""

    bounds: tuple[float, float]
    _value: Fraction | float
    _kept: tuple[str, ...] = ("value",)

    def __init__(self, *targets: Target | float, bounds: tuple[float, float]) -> None:
        """Steer to ``targets`` (floats are nats), the lower edge of a band first, with a value within ``bounds``.

        Raises:
            RLVRError: If a target is no entropy or the bounds are no interval.
        """
        super().__init__()
        low, high = bounds
        if not -math.inf < low < high < math.inf:
            raise RLVRError(
                f"the bounds of the {self.kind} controller are {low} and {high} but the lower must be below the upper"
            )
        self.bounds = (float(low), float(high))
        self._targets = [target if isinstance(target, Target) else Target.parse(target, 1) for target in targets]

    @property
    def value(self) -> float:
        """See ``Controller.value``; the nearest float of a fraction."""
        return float(self._value)

    @property
    def band(self) -> tuple[float, float] | None:
        """See ``Controller.band``."""
        if not all(target.known for target in self._targets):
            return None
        aims = [target.at(max(self.steps - 1, 0)) for target in self._targets]
        return aims[0], aims[-1]

    def wait(self, signal: float) -> None:
        """Let a step pass in which the value stays: the targets' clock moves on and they see ``signal``."""
        super().update(signal)
        for target in self._targets:
            target.observe(signal)

    def update(self, signal: float) -> float:
        """See ``Controller.update``."""
        self.wait(signal)
        self._move(signal, *(target.at(self.steps - 1) for target in self._targets))
        return self.value

    @abstractmethod
    def _move(self, signal: float, *targets: float) -> None:
        """Change the value, given the step's entropy and targets."""

    def _check_initial(self, initial: float) -> None:
        if not self.bounds[0] <= initial <= self.bounds[1]:
            raise RLVRError(
                f"initial is {initial} but the value of the {self.kind} controller lies in "
                f"[{self.bounds[0]:g}, {self.bounds[1]:g}]"
            )

    def _check_step(self, step_size: float) -> None:
        width = self.bounds[1] - self.bounds[0]
        if not 0.0 < step_size <= width:
            raise RLVRError(f"step_size is {step_size} but must lie in (0, {width:g}], the width of the bounds")

    def state_dict(self) -> State:
        """See ``Controller.state_dict``; fractions are texts such as ``"7/20"``, the rest floats.

        ``first_signal`` is what targets that are shares refer to.
        """
        state = super().state_dict() | {"first_signal": self._targets[0].first}
        for name in self._kept:
            number = getattr(self, f"_{name}")
            state[name] = str(number) if isinstance(number, Fraction) else number
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Controller.load_state_dict``."""
        super().load_state_dict(state)
        for target in self._targets:
            target.first = state["first_signal"]
        for name in self._kept:
            number = state[name]
            setattr(self, f"_{name}", Fraction(number) if isinstance(number, str) else float(number))
        if not self.bounds[0] <= self.value <= self.bounds[1]:
            raise RLVRError(
                f"the checkpoint's {self.kind} controller stands at {self.value:g} but this run's recipe holds it in "
                f"[{self.bounds[0]:g}, {self.bounds[1]:g}]; resume with the bounds that it was saved with"
            )


class EntropyGuided(Feedback):
    """One step down if the entropy is below the target, else one step up: Eq. 5 of PAR (arXiv:2511.05993)."""

    kind = "entropy_guided"
    direction = 1

    def __init__(
        self,
        *,
        target: Target | float = 0.2,
        step_size: float = 0.05,
        initial: float = 0.0,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        """Start at ``initial``; the defaults are the paper's.

        Raises:
            RLVRError: If ``target`` is no entropy, ``step_size`` wider than the bounds or ``initial`` outside them.
        """
        super().__init__(target, bounds=(low, high))
        self._check_step(step_size)
        self._check_initial(initial)
        self._low, self._high = exact(low), exact(high)
        self._step, self._value = exact(step_size), exact(initial)

    def _move(self, signal: float, *targets: float) -> None:
        moved = self._value - self._step if signal < targets[0] else self._value + self._step
        self._value = min(max(moved, self._low), self._high)


class AdaptiveCoefficient(Feedback):
    """Ada-Ent-Reg of Skywork-OR1 (arXiv:2505.22312): a coefficient c that grows while the entropy is below the target.

    An update with entropy H sets the value to c if H <= target, else 0, and only then moves c: up one step if
    H < target, else down, held in [0, ``high``]. This is α_k = c_k·1[H_k <= target] of the paper when the value after
    the update is in force. c moves while the gate is closed too; gated by its own value it would never leave 0.
    """

    kind = "adaptive_coefficient"
    direction = -1
    _kept = ("value", "coefficient")

    def __init__(
        self, target: Target | float, *, step_size: float = 0.005, high: float = 1.0, initial: float = 0.0
    ) -> None:
        """Start with c = ``initial`` and the gate closed; the paper's step is 0.005, its scripts' 1e-4.

        Raises:
            RLVRError: If ``target`` is no entropy, ``step_size`` wider than the bounds or ``initial`` outside them.
        """
        super().__init__(target, bounds=(0.0, high))
        self._check_step(step_size)
        self._check_initial(initial)
        self._high, self._step = exact(high), exact(step_size)
        self._coefficient, self._value = exact(initial), Fraction(0)

    def _move(self, signal: float, *targets: float) -> None:
        self._value = self._coefficient if signal <= targets[0] else Fraction(0)
        moved = self._coefficient + (self._step if signal < targets[0] else -self._step)
        self._coefficient = min(max(moved, Fraction(0)), self._high)


class ProportionalIntegral(Feedback):
    """clip(bias + direction·(kp·e + ki·Σe), low, high) with the error e = H - target.

    ``anti_windup`` leaves an error out of the sum if the value is beyond a bound and the error pushes it further: the
    value then turns back with the error instead of after as many steps as it spent at the bound.

    EntroPIC (arXiv:2511.15248) is kp 1, ki 0.01, bounds ±1, no anti-windup, and keeps one sum per rank; this is one
    sum per run.
    """

    kind = "proportional_integral"
    _kept = ("value", "sum")

    def __init__(
        self,
        target: Target | float,
        *,
        kp: float,
        ki: float,
        low: float,
        high: float,
        bias: float = 0.0,
        direction: int = 1,
        deadband: float = 0.0,
        anti_windup: bool = True,
    ) -> None:
        """Start at ``bias``, clipped; an error of at most ``deadband`` nats counts as none.

        Raises:
            RLVRError: If ``target`` is no entropy, the bounds are no interval, a gain or the deadband is negative or
                not finite, or ``direction`` is neither 1 nor -1.
        """
        super().__init__(target, bounds=(low, high))
        for name, number in {"kp": kp, "ki": ki, "deadband": deadband}.items():
            if not 0.0 <= number < math.inf:
                raise RLVRError(f"{name} is {number} but must be finite and not negative; direction carries the sign")
        if direction not in (-1, 1) or not math.isfinite(bias):
            raise RLVRError(f"direction is {direction} and bias {bias} but must be 1 or -1 and a finite number")
        self.direction, self._bias, self._kp, self._ki = direction, bias, kp, ki
        self._deadband, self._anti_windup = deadband, anti_windup
        self._sum = 0.0
        self._value = min(max(bias, low), high)

    @property
    def band(self) -> tuple[float, float] | None:
        """See ``Controller.band``; the deadband lies inside."""
        band = super().band
        return None if band is None else (band[0] - self._deadband, band[1] + self._deadband)

    def _move(self, signal: float, *targets: float) -> None:
        error = signal - targets[0]
        if abs(error) <= self._deadband:
            error = 0.0
        total = self._sum + error
        wanted = self._bias + self.direction * (self._kp * error + self._ki * total)
        self._value = min(max(wanted, self.bounds[0]), self.bounds[1])
        beyond = wanted - self._value
        if not (self._anti_windup and beyond * self.direction * error > 0.0):
            self._sum = total


class Gate(Feedback):
    """``on`` while the entropy is below the target, else ``off``: STARE (arXiv:2606.19236) acts only then."""

    kind = "gate"

    def __init__(self, target: Target | float, *, on: float, off: float = 0.0) -> None:
        """Start ``off``.

        Raises:
            RLVRError: If ``target`` is no entropy or ``on`` equals ``off``.
        """
        super().__init__(target, bounds=(min(on, off), max(on, off)))
        self.direction = -1 if on > off else 1
        self._on, self._off, self._value = on, off, off

    def _move(self, signal: float, *targets: float) -> None:
        self._value = self._on if signal < targets[0] else self._off


class BangBang(Feedback):
    """-1 below the band, 1 above it, 0 inside: Entrocraft's released rule (arXiv:2604.26326)."""

    kind = "bang_bang"
    direction = 1

    def __init__(self, lower: Target | float, upper: Target | float) -> None:
        """Start at 0.

        Raises:
            RLVRError: If an edge is no entropy, or ``lower`` is visibly above ``upper``.
        """
        super().__init__(lower, upper, bounds=(-1.0, 1.0))
        first, second = self._targets
        for below, above in ((first.start, second.start), (first.end, second.end)):
            if below.share == above.share and below.amount > above.amount:
                raise RLVRError(
                    f"the band's lower edge is {float(below.amount):g} but its upper {float(above.amount):g}; swap them"
                )
        self._value = 0.0

    def _move(self, signal: float, *targets: float) -> None:
        lower, upper = targets
        self._value = -1.0 if signal < lower else float(signal > upper)


class Multiplicative(Feedback):
    """Times ``factor`` if the entropy is below the target, divided by it if above: ζ of REPO-R (arXiv:2603.11682)."""

    kind = "multiplicative"
    direction = -1

    def __init__(self, target: Target | float, *, initial: float, low: float, high: float, factor: float = 2.0) -> None:
        """Start at ``initial``; ``low`` must be positive, or the value could not leave it.

        Raises:
            RLVRError: If ``target`` is no entropy, ``low`` or ``factor`` is too small or ``initial`` out of bounds.
        """
        super().__init__(target, bounds=(low, high))
        if low <= 0.0 or not 1.0 < factor < math.inf:
            raise RLVRError(f"low is {low} and factor {factor} but low must be above 0 and factor above 1")
        self._check_initial(initial)
        self._factor, self._value = factor, initial

    def _move(self, signal: float, *targets: float) -> None:
        moved = self._value * self._factor ** ((signal < targets[0]) - (signal > targets[0]))
        self._value = min(max(moved, self.bounds[0]), self.bounds[1])
