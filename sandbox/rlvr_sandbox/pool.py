"""The worker pool: bounded queue in, one judgement for every item out, whatever the items do to the workers."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType

from rlvr_sandbox.process import WorkerProcess, WorkItem
from rlvr_sandbox.verdicts import Judgement, SandboxError, Verdict

MAX_PENDING = 32_768
MAX_CHUNK = 64
MAX_FAULTS = 2
TICK_S = 0.1
RESPAWN_DELAY_S = 1.0
STOPPING = "the service is stopping; retry once it is up again"

logger = logging.getLogger(__name__)


class UnavailableError(SandboxError):
    """The service cannot judge this request now: it has too many unanswered items, or is stopping."""


class _Outcome(enum.Enum):
    """How a worker's turn on a chunk ended: all judged, its current item overran, it failed, nobody waits any more."""

    DONE = enum.auto()
    OVERRUN = enum.auto()
    FAULT = enum.auto()
    CLOSED = enum.auto()


class _Batch:
    """One request's items and what is known of them."""

    def __init__(self, items: Sequence[WorkItem]) -> None:
        self.items = items
        self.judgements: list[Judgement | None] = [None] * len(items)
        self.faults: Counter[int] = Counter()
        self.done = asyncio.Event()
        self.closed = False
        self._unanswered = len(items)

    def settle(self, index: int, judgement: Judgement) -> None:
        self.judgements[index] = judgement
        self._unanswered -= 1
        if self._unanswered == 0:
            self.done.set()


class Pool:
    """An async context manager around ``workers`` killable processes.

    An item is judged by the CPU time it takes, so that a busy machine does not turn right answers into wrong ones.
    Wall time only tells that a worker is stuck, which counts as its fault and not the item's. A task of the pool that
    fails cancels the body of the ``async with``.
    """

    def __init__(self, *, workers: int, item_cpu_s: float) -> None:
        """Configure the pool.

        Args:
            workers: Number of worker processes, at least 1.
            item_cpu_s: CPU seconds that one item may take; 3 times that plus 2 s of wall time make a worker stuck.
        """
        self._size = workers
        self._item_cpu_s = item_cpu_s
        self._stuck_after_s = 3 * item_cpu_s + 2
        self._queue: asyncio.Queue[tuple[_Batch, deque[int]]] = asyncio.Queue()
        self._open: set[_Batch] = set()
        self._stopping = False
        self._workers: list[WorkerProcess] = []
        self._slots: list[asyncio.Task[None]] = []
        self._tasks = asyncio.TaskGroup()

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

    async def judge(self, items: Sequence[WorkItem], deadline_s: float) -> list[Judgement]:
        """Judge ``items``, in order, within ``deadline_s`` seconds; what is unfinished then is ``infra_error``.

        Raises:
            UnavailableError: If too many items of other requests are unanswered, or ``stop`` is called meanwhile.
        """
        if self._stopping:
            raise UnavailableError(STOPPING)
        pending = sum(len(batch.items) for batch in self._open)
        if pending + len(items) > MAX_PENDING:
            raise UnavailableError(
                f"{pending} items are waiting and {len(items)} more would pass the limit of {MAX_PENDING}; "
                "retry later or add workers"
            )
        if not items:
            return []
        batch = _Batch(items)
        self._open.add(batch)
        try:
            size = min(MAX_CHUNK, -(-len(items) // (4 * self._size)))
            for start in range(0, len(items), size):
                self._queue.put_nowait((batch, deque(range(start, min(start + size, len(items))))))
            async with asyncio.timeout(deadline_s):
                await batch.done.wait()
        except TimeoutError:
            pass
        finally:
            batch.closed = True
            self._open.discard(batch)
        if self._stopping:
            raise UnavailableError(STOPPING)
        late = Judgement(Verdict.INFRA_ERROR, f"not judged within the deadline of {deadline_s:g} s", deadline_s)
        return [judgement or late for judgement in batch.judgements]

    def stop(self) -> None:
        """Give up every request now, without a verdict."""
        self._stopping = True
        for batch in self._open:
            batch.done.set()

    async def _run_slot(self, slot: int) -> None:
        while True:
            if self._workers[slot].ended:
                await self._respawn(slot)
            batch, todo = await self._queue.get()
            if batch.closed:
                continue
            if self._workers[slot].ended:
                self._queue.put_nowait((batch, todo))
                continue
            await self._judge_chunk(self._workers[slot], batch, todo)

    async def _respawn(self, slot: int) -> None:
        await self._workers[slot].kill()
        try:
            self._workers[slot] = await WorkerProcess.spawn()
        except SandboxError as error:
            logger.error("%s", error)
            await asyncio.sleep(RESPAWN_DELAY_S)

    async def _judge_chunk(self, worker: WorkerProcess, batch: _Batch, todo: deque[int]) -> None:
        """Let ``worker`` judge the items ``todo`` of ``batch``; what it leaves undone goes back to the queue."""
        outcome = await self._watch(worker, batch, todo)
        if outcome is _Outcome.DONE:
            return
        await worker.kill()
        if outcome is _Outcome.OVERRUN:
            detail = f"more than {self._item_cpu_s:g} s of CPU time"
            batch.settle(todo.popleft(), Judgement(Verdict.TIME_LIMIT, detail, self._item_cpu_s))
        elif outcome is _Outcome.FAULT:
            batch.faults[todo[0]] += 1
            if batch.faults[todo[0]] == MAX_FAULTS:
                detail = f"{MAX_FAULTS} workers died or hung without using CPU time on this item"
                batch.settle(todo.popleft(), Judgement(Verdict.INFRA_ERROR, detail))
        if todo:
            self._queue.put_nowait((batch, todo))

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
