"""What every part of the service shares: verdicts, judgements and the error a user can mend."""

from __future__ import annotations

import enum
from typing import NamedTuple


class SandboxError(Exception):
    """A failure that the user can mend; its text is one sentence naming what, which value and how to mend it."""


class Verdict(enum.StrEnum):
    """What the service says of one item. ``INFRA_ERROR`` means that the service failed, not the response."""

    ACCEPTED = "accepted"
    WRONG_ANSWER = "wrong_answer"
    NO_ANSWER = "no_answer"
    TIME_LIMIT = "time_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    RUNTIME_ERROR = "runtime_error"
    COMPILE_ERROR = "compile_error"
    INFRA_ERROR = "infra_error"


class Judgement(NamedTuple):
    """A verdict with its reason.

    Attributes:
        verdict: The verdict.
        detail: Why, for a human; empty where the verdict says it all.
        seconds: Wall time spent on the item.
    """

    verdict: Verdict
    detail: str = ""
    seconds: float = 0.0
