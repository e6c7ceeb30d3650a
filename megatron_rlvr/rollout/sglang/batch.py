"""The requests of one call of `SGLangFleet.generate`: which wait, which are on the wire, and when enough is there."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_rlvr.core import Sample
from megatron_rlvr.rollout.sglang.client import SGLangClient, SGLangError
from megatron_rlvr.rollout.sglang.engines import FleetEngine
from megatron_rlvr.rollout.sglang.samples import sample_rids
from megatron_rlvr.rollout.sglang.wire import Wire

# Longest wait for servers to be told, and for threads that were hung up on, seconds.
FAREWELL_S = 1.0
_AGAIN_S = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """Samples number ``copies`` of the prompt at position ``group``."""

    group: int
    copies: range
    prompt_ids: list[int]


def requests_for(encoded: Sequence[list[int]], count: int, *, together: bool) -> list[Request]:
    """The requests for ``count`` samples of every prompt, one a prompt if ``together``, else one a sample."""
    size = count if together else 1
    return [
        Request(group, range(start, start + size), prompt_ids)
        for group, prompt_ids in enumerate(encoded)
        for start in range(0, count, size)
    ]


@dataclass(eq=False, slots=True)
class Attempt:
    """A request on its way to a server.

    Attributes:
        request: What is asked for.
        engine: Whose load it counts to, and who is asked where there is no router.
        oldest: Version of the weights that were served when it left.
        resyncs: How many resyncs had begun then.
        wire: Its connection.
        rid: Its id at the servers. No other has it, nor one that begins with it: a server aborts by prefix.
    """

    request: Request
    engine: FleetEngine
    oldest: int
    resyncs: int
    wire: Wire = field(default_factory=Wire)
    rid: str = field(default_factory=lambda: uuid.uuid4().hex)


class Batch:
    """Shared by the thread that called and those that send; ``changed`` guards it and tells of every change."""

    def __init__(self, changed: threading.Condition, requests: Sequence[Request], wanted: int) -> None:
        """Nothing is sent yet.

        Args:
            changed: Notified when the batch is over.
            requests: All samples of every prompt, each once.
            wanted: How many prompts are enough.
        """
        self._changed = changed
        self._waiting = deque(requests)
        self._missing = Counter(request.group for request in requests)
        self._wanted = wanted
        self._samples: dict[int, dict[int, list[Sample]]] = defaultdict(dict)
        self._failure: BaseException | None = None
        self.over = not wanted
        self.attempts: set[Attempt] = set()

    def take(self) -> Request | None:
        """The next request to send; None if there is none, or the batch is over."""
        with self._changed:
            return self._waiting.popleft() if self._waiting and not self.over else None

    def deliver(self, request: Request, samples: list[Sample]) -> None:
        """Keep the samples of ``request``; those that come once the batch is over are dropped."""
        with self._changed:
            if self.over:
                return
            self._samples[request.group][request.copies.start] = samples
            self._missing[request.group] -= 1
            if not self._missing[request.group]:
                self._wanted -= 1
            if not self._wanted:
                self.end()

    def end(self, failure: BaseException | None = None) -> None:
        """Nothing more is wanted, be it because all is there or because of ``failure``; only the first end counts."""
        with self._changed:
            if not self.over:
                self.over, self._failure = True, failure
                self._changed.notify_all()

    def result(self) -> list[Sample]:
        """The samples of the first prompts that were complete, in prompt order, once the batch is over.

        Raises:
            BaseException: What ended it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.over)
            if self._failure is not None:
                raise self._failure
            return [
                sample
                for group, parts in sorted(self._samples.items())
                if not self._missing[group]
                for _, samples in sorted(parts.items())
                for sample in samples
            ]

    def hang_up(self, servers: Callable[[Attempt], Sequence[SGLangClient]]) -> None:
        """Abort what is on the wire at its ``servers``, cut off what does not return, and be back within seconds."""
        with self._changed:
            left = set(self.attempts)
        asked: dict[SGLangClient, set[Attempt]] = defaultdict(set)
        for attempt in left:
            for client in servers(attempt):
                asked[client].add(attempt)
        deadline = time.monotonic() + FAREWELL_S
        threads = [
            threading.Thread(target=self._abort, args=(client, attempts, deadline), daemon=True)
            for client, attempts in asked.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        for attempt in left:
            attempt.wire.cut()
        with self._changed:
            self._changed.wait_for(lambda: not self.attempts, FAREWELL_S)

    def _abort(self, client: SGLangClient, attempts: set[Attempt], deadline: float) -> None:
        """Tell one server again and again: an abort that overtakes its request is forgotten there."""
        while True:
            with self._changed:
                left = attempts & self.attempts
            for rid in [rid for attempt in left for rid in sample_rids(attempt.rid, len(attempt.request.copies))]:
                if (patience := deadline - time.monotonic()) <= 0:
                    return
                try:
                    client.abort(rid, patience)
                except SGLangError as error:
                    _log.info("requests are hung up on, as they could not be aborted: %s", error)
                    return
            with self._changed:
                if self._changed.wait_for(lambda: not attempts & self.attempts, _AGAIN_S):
                    return
