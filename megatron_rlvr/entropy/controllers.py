"""What a controller of one number is, and those that follow the step count alone; ``feedback`` has those that steer.

Steps count from 0 and each has one ``update``. Whether the value before it or after it is in force during the step is
the caller's choice; for everything here it is the value before.

Source: Positive-Advantage Reweighting, arXiv:2511.05993 (Findings of ACL 2026): the two schedules beside its Eq. 5.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy.targets import course, exact

State = dict[str, Any]


class Controller(Protocol):
    """What a training loop asks of a controller. Its state never depends on ranks or micro-batches.

    Attributes:
        saturated_low: Updates that found the value at the lower bound.
        saturated_high: Updates that found the value at the upper bound.
    """

    saturated_low: int
    saturated_high: int

    @property
    def value(self) -> float:
        """The value now."""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Least and greatest value, or None for a constant, which has no bounds to sit at."""

    @property
    def band(self) -> tuple[float, float] | None:
        """The entropies (nats) that the last update was content with, from lowest to highest; a single target is both.

        None without feedback, and before the first signal where the target is a share of it.
        """

    @property
    def direction(self) -> int:
        """1 if more entropy means a higher value, -1 if a lower one, 0 without feedback."""

    def update(self, signal: float) -> float:
        """Take the step's entropy (nats) and return the new value.

        Raises:
            RLVRError: If ``signal`` is NaN or infinite; the controller is then unchanged.
        """

    def state_dict(self) -> State:
        """Everything that a resumed run needs, as JSON values; bit-equal after a round trip."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``.

        Raises:
            RLVRError: If the state belongs to another kind of controller or does not fit this one.
        """


class Stepped(ABC):
    """Bookkeeping that every controller shares: the step count, the bounds' counters and the state's frame."""

    kind: str
    bounds: tuple[float, float] | None = (0.0, 1.0)
    direction = 0

    def __init__(self) -> None:
        self.steps = 0
        self.saturated_low = 0
        self.saturated_high = 0

    @property
    @abstractmethod
    def value(self) -> float:
        """See ``Controller.value``."""

    @property
    def band(self) -> tuple[float, float] | None:
        """See ``Controller.band``."""
        return None

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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
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


class Constant(Stepped):
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


class StageBased(Stepped):
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


class EpochWise(Stepped):
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


class Linear(Stepped):
    """A straight line from ``start`` in step 0 to ``end`` in step ``steps - 1``, then ``end``; exact on decimals."""

    kind = "linear"
    _cosine = False

    def __init__(self, start: float, end: float, steps: int) -> None:
        """Plan ``steps`` steps; one alone has ``end``.

        Raises:
            RLVRError: If an end is not finite or ``steps`` not positive.
        """
        super().__init__()
        if not (math.isfinite(start) and math.isfinite(end)):
            raise RLVRError(f"a {self.kind} course runs from {start} to {end} but both ends must be finite")
        if steps < 1:
            raise RLVRError(f"a {self.kind} course has {steps} steps but needs at least one")
        self.bounds = (min(start, end), max(start, end))
        self._start, self._end, self._steps = exact(start), exact(end), steps

    @property
    def value(self) -> float:
        """The course at the current step."""
        return float(course(self._start, self._end, self.steps, self._steps, cosine=self._cosine))


class Cosine(Linear):
    """Half a cosine from ``start`` in step 0 to ``end`` in step ``steps - 1``, flat at both ends, then ``end``."""

    kind = "cosine"
    _cosine = True
