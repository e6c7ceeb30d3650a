"""From what the supervisor saw to a verdict."""

from __future__ import annotations

from rlvr_sandbox.execution import Ending, Outcome
from rlvr_sandbox.verdicts import Judgement, Verdict

MAX_DETAIL_CHARS = 200

_FAILURES = {
    Ending.TIME_LIMIT: Verdict.TIME_LIMIT,
    Ending.MEMORY_LIMIT: Verdict.MEMORY_LIMIT,
    Ending.OUTPUT_LIMIT: Verdict.OUTPUT_LIMIT,
    Ending.COMPILE_ERROR: Verdict.COMPILE_ERROR,
    Ending.INFRA_ERROR: Verdict.INFRA_ERROR,
}


def failure(outcome: Outcome) -> Judgement | None:
    """Why the run counts for nothing whatever it printed; None where it exited with status 0."""
    if outcome.ending in _FAILURES:
        return Judgement(_FAILURES[outcome.ending], outcome.detail or last_line(outcome.stderr))
    if outcome.ending is Ending.EXITED and outcome.exit_status == 0:
        return None
    how = f"signal {outcome.signal}" if outcome.ending is Ending.SIGNALLED else f"exit status {outcome.exit_status}"
    return Judgement(Verdict.RUNTIME_ERROR, ": ".join(filter(None, (how, last_line(outcome.stderr)))))


def end_of_session(outcome: Outcome) -> Judgement:
    """The judgement of a program that ended before it had answered; exit status 0 is no excuse."""
    return failure(outcome) or Judgement(Verdict.RUNTIME_ERROR, "the program ended before it had answered")


def last_line(text: bytes) -> str:
    """The last line of what a program said, for a human."""
    lines = text[-2_000:].decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:MAX_DETAIL_CHARS] if lines else ""
