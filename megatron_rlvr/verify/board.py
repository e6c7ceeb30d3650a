"""The board on which the threads of one ``verify`` call find chunks of work and leave verdicts."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence

from megatron_rlvr.core import RLVRError, Verdict
from megatron_rlvr.verify.replicas import Replica

# A chunk is sent a second time after that share of the time in which it made no progress.
HEDGE_SHARE = 0.1
MIN_HEDGE_S, MAX_HEDGE_S = 0.5, 10.0
MAX_INFRA_ERRORS = 2


class Chunk:
    """Some of the items, which travel together.

    Attributes:
        positions: Where they stand in the call.
        last: The replica that it was sent to last.
    """

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = positions
        self.last: Replica | None = None
        self.progress_at = 0.0
        self.under_way = 0
        self.hedged = False


class Board:
    """Work and verdicts; every method may be called from any thread. The first verdict of an item counts."""

    def __init__(self, chunks: Sequence[Chunk], count: int, end: float) -> None:
        """Put up ``chunks`` of ``count`` items, to be judged before ``end`` of the monotonic clock."""
        self.end = end
        self._hedge_after_s = min(max(HEDGE_SHARE * (end - time.monotonic()), MIN_HEDGE_S), MAX_HEDGE_S)
        self._fresh = deque(chunks)
        self._sent: list[Chunk] = []
        self._verdicts: list[Verdict | None] = [None] * count
        self._infra_errors: Counter[int] = Counter()
        self._unanswered = count
        self._error: RLVRError | None = None
        self._troubles = ["no reply in time"]
        self._changed = threading.Condition()

    @property
    def over(self) -> bool:
        """Whether nothing is left to do, or no time."""
        return self._unanswered == 0 or self._error is not None or time.monotonic() >= self.end

    @property
    def trouble(self) -> str:
        """What went wrong last."""
        return self._troubles[-1]

    def take(self) -> Chunk | None:
        """The next chunk to send: a new one, one that failed, or one that lags; None once it is over."""
        with self._changed:
            while not self.over:
                chunk = self._fresh.popleft() if self._fresh else self._laggard()
                if chunk is not None:
                    if not chunk.under_way:
                        self._sent.append(chunk)
                    chunk.under_way += 1
                    chunk.progress_at = time.monotonic()
                    return chunk
                self._changed.wait(min(self._hedge_after_s / 4, max(0.0, self.end - time.monotonic())))
            return None

    def _laggard(self) -> Chunk | None:
        """A chunk without progress for too long that is not under way twice yet, the stalest first."""
        lagging = time.monotonic() - self._hedge_after_s
        stale = [chunk for chunk in self._sent if not chunk.hedged and chunk.progress_at < lagging and self.open(chunk)]
        if not stale:
            return None
        chunk = min(stale, key=lambda each: each.progress_at)
        chunk.hedged = True
        return chunk

    def open(self, chunk: Chunk) -> list[int]:
        """The positions of ``chunk`` that have no verdict."""
        return [position for position in chunk.positions if self._verdicts[position] is None]

    def needless(self, chunk: Chunk) -> bool:
        """Whether nobody waits for ``chunk`` any more."""
        return self.over or not self.open(chunk)

    def settle(self, chunk: Chunk, position: int, verdict: Verdict, detail: str) -> None:
        """Note a verdict; one that says that the service failed counts from the second time on."""
        with self._changed:
            if verdict is Verdict.INFRA_ERROR:
                self._troubles.append(detail)
                self._infra_errors[position] += 1
                if self._infra_errors[position] < MAX_INFRA_ERRORS:
                    return
            if self._verdicts[position] is None:
                self._verdicts[position] = verdict
                self._unanswered -= 1
                chunk.progress_at = time.monotonic()
            if self.over:
                self._changed.notify_all()

    def give_back(self, chunk: Chunk, trouble: str = "") -> None:
        """End one sending of ``chunk``; what it left open is sent again once no other sending is under way."""
        with self._changed:
            if trouble:
                self._troubles.append(trouble)
            chunk.under_way -= 1
            if not chunk.under_way:
                self._sent.remove(chunk)
                chunk.hedged = False
                if self.open(chunk):
                    self._fresh.append(chunk)
            self._changed.notify_all()

    def fail(self, error: RLVRError) -> None:
        """Give everything up because of ``error``."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def wait(self) -> list[Verdict]:
        """Every verdict, once it is over; ``INFRA_ERROR`` where there is none.

        Raises:
            RLVRError: The one that ``fail`` was called with.
        """
        with self._changed:
            while not self.over:
                self._changed.wait(max(0.0, self.end - time.monotonic()))
            if self._error is not None:
                raise self._error
            return [verdict or Verdict.INFRA_ERROR for verdict in self._verdicts]
