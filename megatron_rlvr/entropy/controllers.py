"""Controllers of one number, the loss weight of tokens with positive advantage.

Steps count from 0. The value used in step k is ``value`` before the step's only ``update``, which takes the entropy
H_k of the policy that made the step's rollouts and returns the value for step k + 1.

Source: Positive-Advantage Reweighting, arXiv:2511.05993 (Findings of ACL 2026): Eq. 5 and the two schedules beside it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from typing import Protocol

from megatron_rlvr.core import RLVRError

State = dict[str, str | int]


class Controller(Protocol):
    """What a training loop asks of a controller. Its state never depends on ranks or micro-batches.

    Attributes:
        saturated_low: Finished steps whose value was the lower bound.
        saturated_high: Finished steps whose value was the upper bound.
    """

    saturated_low: int
    saturated_high: int

    @property
    def value(self) -> float:
        """The value to use in the current step."""

    def update(self, signal: float) -> float:
        """Finish the step with its entropy (nats) and return the value for the next one.

        Raises:
            RLVRError: If ``signal`` is NaN or infinite; the controller is then unchanged.
        """

    def state_dict(self) -> State:
        """Everything that a resumed run needs, as JSON values; bit-equal after a round trip."""

    def load_state_dict(self, state: Mapping[str, str | int]) -> None:
        """Continue from ``state``.

        Raises:
            RLVRError: If the state belongs to another kind of controller or does not fit this one.
        """


class _Stepped(ABC):
    """Bookkeeping that every controller shares: the step count, the bounds' counters and the state's frame."""

    kind: str
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __init__(self) -> None:
        self.steps = 0
        self.saturated_low = 0
        self.saturated_high = 0

    @property
    @abstractmethod
    def value(self) -> float:
        """The value to use in the current step."""

    def update(self, signal: float) -> float:
        """See ``Controller.update``."""
        if not math.isfinite(signal):
            raise RLVRError(
                f"the entropy of step {self.steps} is {signal}, which cannot steer the {self.kind} controller; look "
                "for non-finite logits in the policy and resume from the last checkpoint"
            )
        if self.bounds is not None:
            self.saturated_low += self.value == self.bounds[0]
            self.saturated_high += self.value == self.bounds[1]
        self.steps += 1
        return self.value

    def state_dict(self) -> State:
        """See ``Controller.state_dict``."""
        return {
            "kind": self.kind,
            "steps": self.steps,
            "saturated_low": self.saturated_low,
            "saturated_high": self.saturated_high,
        }

    def load_state_dict(self, state: Mapping[str, str | int]) -> None:
        """See ``Controller.load_state_dict``."""
        if state.get("kind") != self.kind:
            raise RLVRError(
                f"the checkpoint holds the state of a {state.get('kind')} controller but this run's recipe needs "
                f"{self.kind}; resume with the recipe that wrote it or start a new run"
            )
        if missing := self.state_dict().keys() - state.keys():
            raise RLVRError(
                f"the checkpoint's {self.kind} controller state lacks {', '.join(sorted(missing))}; resume from a "
                "checkpoint that is whole"
            )
        self.steps = int(state["steps"])
        self.saturated_low = int(state["saturated_low"])
        self.saturated_high = int(state["saturated_high"])


class Constant(_Stepped):
    """The same value in every step: 1 is GRPO, 0 trains on non-positive advantages only. It has no bounds to sit at."""

    kind = "constant"
    bounds = None

    def __init__(self, value: float) -> None:
        """Hold ``value``."""
        super().__init__()
        self._value = value

    @property
    def value(self) -> float:
        """The constant."""
        return self._value


class EntropyGuided(_Stepped):
    """Eq. 5 of the paper: one step down if the entropy is below the target, else one step up, held in [0, 1].

    The value is kept as a fraction and the decimals of ``step_size`` and ``initial`` are taken at their word. Twenty
    steps of 0.05 are therefore exactly 1, a bound is hit or missed as on paper, and no rounding builds up over a run.
    """

    kind = "entropy_guided"

    def __init__(self, *, target: float = 0.2, step_size: float = 0.05, initial: float = 0.0) -> None:
        """Start at ``initial``; ``target`` is an entropy in nats.

        Raises:
            RLVRError: If ``target`` is negative or infinite, ``step_size`` not in (0, 1] or ``initial`` not in [0, 1].
        """
        super().__init__()
        if not 0.0 <= target < math.inf:
            raise RLVRError(f"target is {target} but an entropy in nats is finite and not negative; the paper uses 0.2")
        if not 0.0 < step_size <= 1.0:
            raise RLVRError(f"step_size is {step_size} but must lie in (0, 1]; the paper uses 0.05")
        if not 0.0 <= initial <= 1.0:
            raise RLVRError(f"initial is {initial} but a positive weight lies in [0, 1]; the paper starts at 0")
        self.target = target
        self._step = Fraction(str(step_size))
        self._value = Fraction(str(initial))

    @property
    def value(self) -> float:
        """The fraction's nearest float."""
        return float(self._value)

    def update(self, signal: float) -> float:
        """See ``Controller.update``."""
        super().update(signal)
        moved = self._value - self._step if signal < self.target else self._value + self._step
        self._value = min(max(moved, Fraction(0)), Fraction(1))
        return self.value

    def state_dict(self) -> State:
        """See ``Controller.state_dict``; ``value`` is a fraction such as ``"7/20"``."""
        return super().state_dict() | {"value": str(self._value)}

    def load_state_dict(self, state: Mapping[str, str | int]) -> None:
        """See ``Controller.load_state_dict``."""
        super().load_state_dict(state)
        self._value = Fraction(state["value"])


class StageBased(_Stepped):
    """0 in the first half of training, then linearly up to 1.

    With S = ``total_steps`` and h = S // 2, step k has the value max(0, k + 1 - h) / (S - h): steps 0 .. h - 1 have 0,
    every later step rises by the same amount, and the last one, S - 1, has exactly 1, as has any step beyond.
    """

    kind = "stage_based"

    def __init__(self, total_steps: int) -> None:
        """Plan ``total_steps`` steps.

        Raises:
            RLVRError: If ``total_steps`` is not positive.
        """
        super().__init__()
        if total_steps < 1:
            raise RLVRError(f"total_steps is {total_steps} but par_stage needs at least one step to schedule")
        self._half = total_steps // 2
        self._ramp = total_steps - self._half

    @property
    def value(self) -> float:
        """The schedule at the current step."""
        return min(max(0, self.steps + 1 - self._half), self._ramp) / self._ramp


class EpochWise(_Stepped):
    """(e - 1) / (E - 1) in epoch e = 1 .. E, and 1 beyond.

    The epoch follows from the step count, so the value is the same however a run was cut and resumed. One epoch is
    refused: the formula is then 0 / 0, and its numerator, 0, would train on non-positive advantages only.
    """

    kind = "epoch_wise"

    def __init__(self, *, epochs: int, steps_per_epoch: int) -> None:
        """Plan ``epochs`` epochs of ``steps_per_epoch`` steps; the last may be cut short.

        Raises:
            RLVRError: If there are fewer than two epochs or an epoch has no steps.
        """
        super().__init__()
        if steps_per_epoch < 1:
            raise RLVRError(f"steps_per_epoch is {steps_per_epoch} but par_epoch needs at least one step in an epoch")
        if epochs < 2:
            raise RLVRError(
                f"par_epoch raises the weight from epoch to epoch but the run has {epochs} of {steps_per_epoch} steps; "
                "train for at least two epochs or choose par or par_stage"
            )
        self._rises = epochs - 1
        self._steps_per_epoch = steps_per_epoch

    @property
    def value(self) -> float:
        """The schedule at the current step."""
        return min(self.steps // self._steps_per_epoch, self._rises) / self._rises
