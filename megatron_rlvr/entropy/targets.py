"""Targets: the entropy that a controller steers to, given in nats or as a share, fixed or moving over the run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_rlvr.core import RLVRError

_LEVEL = r"(\d+\.?\d*(?:e[+-]?\d{1,3})?|\.\d+)\s*(%?)"
_TARGET = re.compile(rf"{_LEVEL}(?:\s*([-~]>)\s*{_LEVEL})?", re.IGNORECASE)


def exact(number: float) -> Fraction:
    """The decimals that ``number`` prints as, taken at their word: 0.05 is 1/20, not its nearest float."""
    return Fraction(str(number))


def course(start: Fraction, end: Fraction, step: int, steps: int, *, cosine: bool = False) -> Fraction:
    """``start`` in step 0, ``end`` in step ``steps - 1`` and ever after; a straight line or half a cosine between."""
    if step >= steps - 1:
        return end
    passed = Fraction(step, steps - 1)
    if cosine:
        passed = Fraction((1.0 - math.cos(math.pi * passed)) / 2.0)
    return start + (end - start) * passed


@dataclass(frozen=True, slots=True)
class Level:
    """An entropy: so many nats, or (``share``) so many times the first signal of the run."""

    amount: Fraction
    share: bool

    def nats(self, first: float | None) -> Fraction:
        """The entropy in nats; ``first`` may be None where the level is no share."""
        return self.amount * (exact(first) if self.share and first is not None else 1)


@dataclass(slots=True)
class Target:
    """Where the entropy should be in every step of a run.

    Attributes:
        start: The level in step 0.
        end: The level in the run's last planned step and beyond.
        steps: Planned steps.
        cosine: Whether it moves along half a cosine instead of a straight line.
        first: The first signal that was observed (nats); the only state, to be checkpointed with its controller.
    """

    start: Level
    end: Level
    steps: int
    cosine: bool = False
    first: float | None = None

    @staticmethod
    def parse(text: str | float, total_steps: int) -> Target:
        """Read ``0.2`` (nats), ``75%`` (of the first signal), ``0.6 -> 0.4`` (linear) or ``0.6 ~> 0.4`` (cosine).

        Entrocraft (arXiv:2604.26326) finds a target that falls linearly to do best; fixed ones suit few models.

        Raises:
            RLVRError: If the text is none of these.
        """
        match = _TARGET.fullmatch(str(text).strip())
        if match is None:
            raise RLVRError(
                f"entropy.target is {text!r} but must be an entropy in nats such as 0.2, a share of the run's first "
                "entropy such as 75%, or a course between two of them, 0.6 -> 0.4 (linear) or 0.6 ~> 0.4 (cosine)"
            )
        amount, percent, arrow, *ending = match.groups()
        start = _level(amount, percent)
        return Target(start, _level(*ending) if arrow else start, total_steps, cosine=arrow == "~>")

    @property
    def known(self) -> bool:
        """Whether ``at`` can answer: a share needs the first signal."""
        return self.first is not None or not (self.start.share or self.end.share)

    def observe(self, signal: float) -> None:
        """Keep the first signal (nats); later ones change nothing."""
        if self.first is None:
            self.first = signal

    def at(self, step: int) -> float:
        """The target of step ``step``, counted from 0, in nats.

        Raises:
            RLVRError: If it is a share of the first signal and there was none yet.
        """
        if not self.known:
            raise RLVRError("entropy.target is a share of the run's first entropy; observe one before asking for nats")
        start, end = self.start.nats(self.first), self.end.nats(self.first)
        return float(course(start, end, step, self.steps, cosine=self.cosine))


def _level(amount: str, percent: str) -> Level:
    return Level(Fraction(amount) / (100 if percent else 1), share=bool(percent))
