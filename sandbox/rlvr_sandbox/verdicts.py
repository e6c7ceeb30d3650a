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


class Trust(enum.StrEnum):
    """What a verdict is worth.

    ``ISOLATED``: nothing that the response controls could have written it. ``INPROC``: the tests ran in the
    response's own process, which can forge them. ``UNSAFE``: the code ran without isolation.
    """

    ISOLATED = "isolated"
    INPROC = "inproc"
    UNSAFE = "unsafe"


class Judgement(NamedTuple):
    """A verdict with its reason.

    Attributes:
        verdict: The verdict.
        detail: Why, for a human; empty where the verdict says it all.
        seconds: Wall time spent on the item.
        trust: What the verdict is worth.
        flags: Suspicions about how the response went about it, such as ``walks_frames``; they change no verdict.
    """

    verdict: Verdict
    detail: str = ""
    seconds: float = 0.0
    trust: Trust = Trust.ISOLATED
    flags: tuple[str, ...] = ()
