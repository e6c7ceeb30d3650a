"""Checkers by kind. A checker is a pure function of the response and the spec; it may hang or die in its worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlvr_sandbox.checkers import countdown, math_answer, reasoning_gym_score
from rlvr_sandbox.verdicts import Judgement

Checker = Callable[[str, Mapping[str, Any]], Judgement]

CHECKERS: dict[str, Checker] = {
    "countdown": countdown.judge,
    "math": math_answer.judge,
    "reasoning_gym": reasoning_gym_score.judge,
}
