"""Where every item is judged: it picks the lane, keeps the deadline and the bounds, and answers whatever happens."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack

from rlvr_sandbox.code_lane import CodeLane
from rlvr_sandbox.execution import Limits, Outcome, Program
from rlvr_sandbox.items import CodeItem, Item
from rlvr_sandbox.metrics import Metrics
from rlvr_sandbox.pool import Pool
from rlvr_sandbox.process import WorkItem
from rlvr_sandbox.verdicts import Judgement, SandboxError, Verdict

MAX_PENDING = 32_768
MAX_CACHED = 65_536
STOPPING = "the service is stopping; retry once it is up again"

_CACHED = (Verdict.ACCEPTED, Verdict.WRONG_ANSWER, Verdict.NO_ANSWER)


class UnavailableError(SandboxError):
    """The service cannot judge this request now; the text says why."""


class FullError(UnavailableError):
    """The service has too many unanswered items."""


class NoCodeError(SandboxError):
    """The service runs no code; the text says why."""


class _Cache:
    """Verdicts of the checkers that are pure functions, by a digest of the item; the oldest unused ones go first."""

    def __init__(self) -> None:
        self._judgements: OrderedDict[bytes, Judgement] = OrderedDict()

    @staticmethod
    def key(item: WorkItem) -> bytes:
        return hashlib.blake2b(json.dumps(item).encode(), digest_size=16).digest()

    def get(self, key: bytes) -> Judgement | None:
        judgement = self._judgements.get(key)
        if judgement is not None:
            self._judgements.move_to_end(key)
        return judgement

    def put(self, key: bytes, judgement: Judgement) -> None:
        if judgement.verdict in _CACHED:
            self._judgements[key] = judgement
            if len(self._judgements) > MAX_CACHED:
                self._judgements.popitem(last=False)


class Bench:
    """Judges items of every kind on the worker pool and, where there is isolation, on the code lane."""

    def __init__(self, pool: Pool, code: CodeLane | str, metrics: Metrics) -> None:
        """Judge with what the caller starts and stops.

        Args:
            pool: Judges everything but code.
            code: Judges code; or why this service does not, as the second half of a sentence.
            metrics: Where verdicts are counted.
        """
        self.pool = pool
        self.code = code
        self.metrics = metrics
        self._cache = _Cache()
        self._stopping = asyncio.Event()
        self._draining = False
        self._pending = 0
        metrics.queue_items.labels("all").set_function(lambda: self._pending)

    @property
    def ready(self) -> bool:
        """Whether new items are taken."""
        return not self._draining and self.pool.live_workers > 0

    @property
    def pending(self) -> int:
        """How many items are unanswered."""
        return self._pending

    def drain(self) -> None:
        """Take no more items; those at hand are judged."""
        self._draining = True

    def stop(self) -> None:
        """Give up every request now, without a verdict."""
        self._draining = True
        self._stopping.set()

    def lane(self) -> CodeLane:
        """The code lane.

        Raises:
            NoCodeError: If there is none.
        """
        if isinstance(self.code, str):
            raise NoCodeError(f"this service does not run code because {self.code}")
        return self.code

    def admit(self, count: int) -> None:
        """See whether ``count`` more items can be taken.

        Raises:
            UnavailableError: If not.
        """
        if self._draining:
            raise UnavailableError(STOPPING)
        if self._pending + count > MAX_PENDING:
            raise FullError(
                f"{self._pending} items are waiting and {count} more would pass the limit of {MAX_PENDING}; "
                "retry later or add replicas"
            )

    async def judge(self, items: Sequence[Item], deadline_s: float, priority: int = 0) -> list[Judgement]:
        """One judgement for each item, in order, within ``deadline_s`` seconds; unfinished ones are ``infra_error``.

        Raises:
            UnavailableError: If too many items of other requests are unanswered, or ``stop`` is called meanwhile.
            NoCodeError: If one is code and there is no lane for it.
        """
        found = dict([answer async for answer in self.judged(items, deadline_s, priority) if answer])
        return [found[index] for index in range(len(items))]

    async def judged(
        self, items: Sequence[Item], deadline_s: float, priority: int = 0, tick_s: float = math.inf
    ) -> AsyncGenerator[tuple[int, Judgement] | None]:
        """The same as ``judge``, each one with its index as soon as it is known; None after ``tick_s`` without any."""
        self.admit(len(items))
        clock = asyncio.get_running_loop().time
        end = clock() + deadline_s
        answers: asyncio.Queue[tuple[int, Judgement]] = asyncio.Queue()
        unanswered = dict(enumerate(items))
        stopping = asyncio.create_task(self._stopping.wait())
        self._pending += len(items)
        try:
            with ExitStack() as lanes:
                self._hand_out(items, priority, answers, lanes)
                while unanswered:
                    answer = await _next(answers, stopping, min(end - clock(), tick_s))
                    if answer is not None:
                        self._count(unanswered.pop(answer[0]), answer[1])
                        self._pending -= 1
                    elif stopping.done() or clock() >= end:
                        break
                    yield answer
            if self._stopping.is_set() and unanswered:
                raise UnavailableError(STOPPING)
            late = Judgement(Verdict.INFRA_ERROR, f"not judged within the deadline of {deadline_s:g} s", deadline_s)
            for index, item in unanswered.items():
                self._count(item, late)
                yield index, late
        finally:
            self._pending -= len(unanswered)
            stopping.cancel()

    def _hand_out(
        self,
        items: Sequence[Item],
        priority: int,
        answers: asyncio.Queue[tuple[int, Judgement]],
        lanes: ExitStack,
    ) -> None:
        """Give every item to its lane, or answer it from the cache."""
        code = [(index, item) for index, item in enumerate(items) if isinstance(item, CodeItem)]
        if code:
            programs = [(item.spec, item.response) for _, item in code]
            places = [index for index, _ in code]
            lanes.enter_context(
                self.lane().judging(
                    programs, priority, lambda at, judgement: answers.put_nowait((places[at], judgement))
                )
            )
        todo: list[tuple[int, bytes, WorkItem]] = []
        for index, item in enumerate(items):
            if isinstance(item, CodeItem):
                continue
            work = WorkItem(item.kind, item.response, item.spec.model_dump())
            key = self._cache.key(work)
            if judgement := self._cache.get(key):
                self.metrics.cache_hits.labels(item.kind).inc()
                answers.put_nowait((index, judgement))
            else:
                todo.append((index, key, work))

        def settle(at: int, judgement: Judgement) -> None:
            self._cache.put(todo[at][1], judgement)
            answers.put_nowait((todo[at][0], judgement))

        if todo:
            lanes.enter_context(self.pool.judging([work for *_, work in todo], priority, settle))

    def _count(self, item: Item, judgement: Judgement) -> None:
        mode, language = (item.spec.mode, item.spec.language) if isinstance(item, CodeItem) else ("", "")
        self.metrics.judged(item.kind, mode, language, judgement)

    async def run(self, program: Program, limits: Limits, stdin: bytes, deadline_s: float) -> Outcome | None:
        """What came of one program that is not judged; None when it had not ended within ``deadline_s`` seconds.

        Raises:
            UnavailableError: If too many items are unanswered, or ``stop`` is called meanwhile.
            NoCodeError: If the service runs no code.
        """
        lane = self.lane()
        self.admit(1)
        self._pending += 1
        running = asyncio.create_task(lane.run(program, limits, stdin, 0))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({running, stopping}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                return running.result()
            if self._stopping.is_set():
                raise UnavailableError(STOPPING)
            return None
        finally:
            self._pending -= 1
            running.cancel()
            stopping.cancel()


async def _next(
    answers: asyncio.Queue[tuple[int, Judgement]], stopping: asyncio.Task[bool], wait_s: float
) -> tuple[int, Judgement] | None:
    """The next answer; None once the service stops, or after ``wait_s`` seconds."""
    if not answers.empty():
        return answers.get_nowait()
    getting = asyncio.create_task(answers.get())
    try:
        await asyncio.wait({getting, stopping}, timeout=max(0.0, wait_s), return_when=asyncio.FIRST_COMPLETED)
        return getting.result() if getting.done() else None
    finally:
        getting.cancel()
