"""The code path: every item is judged by running its program under the isolation backend, a few items at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from rlvr_sandbox.execution import Ending, Executor, Limits, Outcome, Program
from rlvr_sandbox.judging import judge_code
from rlvr_sandbox.metering import MeteredExecutor
from rlvr_sandbox.metrics import Metrics
from rlvr_sandbox.pool import Settle
from rlvr_sandbox.specs_code import CodeSpec
from rlvr_sandbox.turns import Turns
from rlvr_sandbox.verdicts import Judgement, Verdict

MAX_ATTEMPTS = 2

CodeItem = tuple[CodeSpec, str]
T = TypeVar("T")

logger = logging.getLogger(__name__)


class CodeLane:
    """Judges responses that are programs, at most ``slots`` at once; the rest waits in order of priority."""

    def __init__(self, executor: Executor, *, slots: int, metrics: Metrics, report: str) -> None:
        """Judge on ``executor``, which stays the caller's to close; ``report`` is what its self-test said."""
        self.executor = executor
        self.report = report
        self.slots = slots
        self._metered = MeteredExecutor(executor, metrics)
        self._metrics = metrics
        self._turns = Turns(slots)
        # A judge that does not end although it was cancelled keeps its turn, but nobody waits for it.
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def judging(self, items: Sequence[CodeItem], priority: int, settle: Settle) -> Iterator[None]:
        """Judge ``items`` for the length of the block, calling ``settle(index, judgement)`` as each one is done."""
        tasks = [
            asyncio.create_task(self._settle(index, spec, response, priority, settle))
            for index, (spec, response) in enumerate(items)
        ]
        self._tasks.update(tasks)
        for task in tasks:
            task.add_done_callback(self._tasks.discard)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    async def run(self, program: Program, limits: Limits, stdin: bytes, priority: int) -> Outcome:
        """Run a program that is not judged, in its turn."""
        arrival = time.monotonic()
        async with self._turns.turn(priority):
            self._metrics.queue_s.labels("code").observe(time.monotonic() - arrival)
            outcome = Outcome(Ending.INFRA_ERROR, None, None, b"", b"", 0.0, 0.0)
            for _ in range(MAX_ATTEMPTS):
                result = await _attempt(self._metered.run(program, limits, stdin))
                outcome = replace(outcome, detail=result) if isinstance(result, str) else result
                if outcome.ending is not Ending.INFRA_ERROR:
                    break
            return outcome

    async def _settle(self, index: int, spec: CodeSpec, response: str, priority: int, settle: Settle) -> None:
        arrival = time.monotonic()
        async with self._turns.turn(priority):
            started = time.monotonic()
            self._metrics.queue_s.labels("code").observe(started - arrival)
            judgement = Judgement(Verdict.INFRA_ERROR)
            for _ in range(MAX_ATTEMPTS):
                result = await _attempt(judge_code(self._metered, spec, response))
                judgement = Judgement(Verdict.INFRA_ERROR, result) if isinstance(result, str) else result
                if judgement.verdict is not Verdict.INFRA_ERROR:
                    break
        settle(index, judgement._replace(detail=judgement.detail[:200], seconds=time.monotonic() - started))


async def _attempt(judging: Coroutine[Any, Any, T]) -> T | str:
    """What ``judging`` returns, or a sentence about what it raised: that is a fault of ours and no verdict."""
    task = asyncio.create_task(judging)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        # The turn is held until the sandbox is free again.
        task.cancel()
        await asyncio.wait({task})
        raise
    if error := task.exception():
        logger.error("running a program failed", exc_info=error)
        return f"the service failed on this item ({type(error).__name__}: {error})"[:200]
    return task.result()
