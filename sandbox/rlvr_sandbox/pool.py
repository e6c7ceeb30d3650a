"""The worker pool: judges what needs no sandbox, whatever the items do to the workers."""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rlvr_sandbox.metrics import Metrics
from rlvr_sandbox.process import WorkerProcess, WorkItem
from rlvr_sandbox.verdicts import Judgement, SandboxError, Verdict

MAX_CHUNK = 64
# A worker that is lost before it has begun says less about the item than one that is lost later.
FAULT, LOSS, MAX_FAULTS = 2, 1, 4
TICK_S = 0.1
RESPAWN_DELAY_S = 1.0

Settle = Callable[[int, Judgement], None]

logger = logging.getLogger(__name__)


class _Outcome(enum.Enum):
    """How a worker's turn on a chunk ended: all judged, its current item overran, it failed, nobody waits any more."""

    DONE = enum.auto()
    OVERRUN = enum.auto()
    FAULT = enum.auto()
    CLOSED = enum.auto()


class _Batch:
    """One request's items and who is told of their judgements."""

    def __init__(self, items: Sequence[WorkItem], settle: Settle) -> None:
        self.items = items
        self.settle = settle
        self.faults: Counter[int] = Counter()
        self.closed = False


class Pool:
    """An async context manager around ``workers`` killable processes.

    An item is judged by the CPU time it takes, so that a busy machine does not turn right answers into wrong ones.
    Wall time only tells that a worker is stuck, which counts as its fault and not the item's. A task of the pool that
    fails cancels the body of the ``async with``.
    """

    def __init__(self, *, workers: int, item_cpu_s: float, metrics: Metrics) -> None:
        """Configure the pool.

        Args:
            workers: Number of worker processes, at least 1.
            item_cpu_s: CPU seconds that one item may take; 3 times that plus 2 s of wall time make a worker stuck.
            metrics: Where waits, kills and restarts are counted.
        """
        self._size = workers
        self._item_cpu_s = item_cpu_s
        self._stuck_after_s = 3 * item_cpu_s + 2
        self._metrics = metrics
        self._queue: asyncio.PriorityQueue[tuple[int, int, float, _Batch, deque[int]]] = asyncio.PriorityQueue()
        self._arrivals = itertools.count()
        self._workers: list[WorkerProcess] = []
        self._slots: list[asyncio.Task[None]] = []
        self._tasks = asyncio.TaskGroup()

    @property
    def size(self) -> int:
        """How many workers there should be."""
        return self._size

    @property
    def live_workers(self) -> int:
        """How many workers are up now."""
        return sum(not worker.ended for worker in self._workers)

    async def __aenter__(self) -> Pool:
        """Start every worker.

        Raises:
            SandboxError: If one does not start.
        """
        self._workers = await asyncio.gather(*(WorkerProcess.spawn() for _ in range(self._size)))
        await self._tasks.__aenter__()
        self._slots = [self._tasks.create_task(self._run_slot(slot)) for slot in range(self._size)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill every worker."""
        for task in self._slots:
            task.cancel()
        try:
            await self._tasks.__aexit__(kind, error, trace)
        finally:
            await asyncio.gather(*(worker.kill() for worker in self._workers))

    @contextmanager
    def judging(self, items: Sequence[WorkItem], priority: int, settle: Settle) -> Iterator[None]:
        """Judge ``items`` for the length of the block, calling ``settle(index, judgement)`` as each one is done."""
        batch = _Batch(items, settle)
        size = max(1, min(MAX_CHUNK, -(-len(items) // (4 * self._size))))
        for start in range(0, len(items), size):
            self._put(priority, batch, deque(range(start, min(start + size, len(items)))))
        try:
            yield
        finally:
            batch.closed = True

    def _put(self, priority: int, batch: _Batch, todo: deque[int]) -> None:
        self._queue.put_nowait((priority, next(self._arrivals), time.monotonic(), batch, todo))

    async def _run_slot(self, slot: int) -> None:
        while True:
            if self._workers[slot].ended:
                await self._respawn(slot)
            priority, _, arrival, batch, todo = await self._queue.get()
            if batch.closed:
                continue
            if self._workers[slot].ended:
                self._put(priority, batch, todo)
                continue
            self._metrics.queue_s.labels("workers").observe(time.monotonic() - arrival)
            if await self._judge_chunk(self._workers[slot], batch, todo):
                self._put(priority, batch, todo)

    async def _respawn(self, slot: int) -> None:
        await self._workers[slot].kill()
        self._metrics.worker_restarts.inc()
        try:
            self._workers[slot] = await WorkerProcess.spawn()
        except SandboxError as error:
            logger.error("%s", error)
            await asyncio.sleep(RESPAWN_DELAY_S)

    async def _judge_chunk(self, worker: WorkerProcess, batch: _Batch, todo: deque[int]) -> bool:
        """Let ``worker`` judge the items ``todo`` of ``batch``; whether it leaves some to another worker."""
        outcome = await self._watch(worker, batch, todo)
        if outcome is _Outcome.DONE:
            return False
        await worker.kill()
        self._metrics.kills.labels("worker", outcome.name.lower()).inc()
        if outcome is _Outcome.OVERRUN:
            detail = f"more than {self._item_cpu_s:g} s of CPU time"
            batch.settle(todo.popleft(), Judgement(Verdict.TIME_LIMIT, detail, self._item_cpu_s))
        elif outcome is _Outcome.FAULT:
            batch.faults[todo[0]] += FAULT if worker.begun else LOSS
            if batch.faults[todo[0]] >= MAX_FAULTS:
                detail = "2 workers died or hung without using CPU time on this item"
                batch.settle(todo.popleft(), Judgement(Verdict.INFRA_ERROR, detail))
        return bool(todo)

    async def _watch(self, worker: WorkerProcess, batch: _Batch, todo: deque[int]) -> _Outcome:
        """Collect judgements until ``todo`` is empty or its first item must be given up."""
        worker.send([batch.items[index] for index in todo])
        item_start = worker.clock()
        while todo:
            if batch.closed:
                return _Outcome.CLOSED
            judgements = await worker.judgements(TICK_S)
            now = worker.clock()
            if judgements:
                for judgement in judgements:
                    batch.settle(todo.popleft(), judgement)
                item_start = now
            elif now.cpu_s - item_start.cpu_s > self._item_cpu_s:
                return _Outcome.OVERRUN
            elif worker.ended or now.wall_s - item_start.wall_s > self._stuck_after_s:
                return _Outcome.FAULT
        return _Outcome.DONE
