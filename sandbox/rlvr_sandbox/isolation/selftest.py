"""The self-test: a backend serves only after the canary attacks have failed on it."""

from __future__ import annotations

import asyncio

from rlvr_sandbox.execution import Ending, Executor, Limits, Outcome, Program
from rlvr_sandbox.isolation.bait import Bait
from rlvr_sandbox.isolation.canaries import AFTERWARDS, CANARIES, Canary
from rlvr_sandbox.verdicts import SandboxError


async def prove(executor: Executor, place: str) -> str:
    """Run every canary attack through ``executor``, with bait laid out in ``place``; returns a line on what held.

    Raises:
        SandboxError: If one attack works, with its name and what was seen.
    """
    with Bait(place) as bait:
        outcomes = await asyncio.gather(*(_attack(executor, bait, canary) for canary in CANARIES))
        outcomes.append(await _attack(executor, bait, AFTERWARDS))
        faults = [fault for fault in (*outcomes, bait.taken()) if fault]
    if faults:
        raise SandboxError(f"backend {executor.name} let a program {'; '.join(faults)}")
    async with executor.open(Program("python", ""), Limits(), "echo") as session:
        answer = await session.call(b"held")
        outcome = await session.finish()
    if answer != b"held" or outcome.ending is not Ending.EXITED:
        raise SandboxError(f"backend {executor.name} cannot hold a session: {outcome.ending}, {_words(outcome)}")
    return f"{len(CANARIES) + 2} of {len(CANARIES) + 2} canaries held"


async def _attack(executor: Executor, bait: Bait, canary: Canary) -> str:
    """Run one canary; what went wrong, empty if it was held."""
    outcome = await executor.run(Program("python", bait.program(canary.source)), canary.limits)
    fault = _fault(canary, outcome)
    return f"{canary.name} ({fault})" if fault else ""


def _fault(canary: Canary, outcome: Outcome) -> str:
    """What was wrong with the outcome; empty if the canary was held."""
    if outcome.ending not in canary.endings:
        return f"it ended as {outcome.ending} instead of {canary.endings[0]}, {_words(outcome)}"
    if outcome.ending is Ending.EXITED and outcome.stdout != b"held\n":
        return _words(outcome)
    return ""


def _words(outcome: Outcome) -> str:
    last = (outcome.stderr or outcome.stdout).decode(errors="replace").strip().splitlines()[-1:]
    return "; ".join([*last, outcome.detail] if outcome.detail else last) or "it said nothing"
