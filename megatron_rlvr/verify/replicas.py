"""The replicas of the verifier service: which one gets the next request, and which one is left alone for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import httpx

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0


class Replica:
    """One address of the service.

    Attributes:
        url: Its base URL.
        http: The client for it.
        load: Requests that it is answering.
        banned_until: The time of the monotonic clock before which it gets no request.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        # Replicas are addressed directly: a proxy of the environment would only see local addresses.
        self.http = httpx.Client(base_url=url, trust_env=False, limits=httpx.Limits(max_connections=None))
        self.load = 0
        self.banned_until = 0.0
        self._failures = 0

    def failed(self, pause_s: float = 0.0) -> None:
        """Leave it alone for ``pause_s`` seconds, or for longer the more often in a row it failed."""
        backoff_s = min(FIRST_BACKOFF_S * 2**self._failures, MAX_BACKOFF_S)
        self._failures += 1
        self.banned_until = time.monotonic() + max(pause_s, backoff_s)

    def answered(self) -> None:
        """It works."""
        self._failures = 0
        self.banned_until = 0.0


class Replicas:
    """All replicas; safe to use from several threads."""

    def __init__(self, urls: Sequence[str]) -> None:
        """Use ``urls``; nothing is sent yet."""
        self._replicas = [Replica(url) for url in urls]
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._replicas)

    def __str__(self) -> str:
        return ", ".join(replica.url for replica in self._replicas)

    @contextmanager
    def pick(self, last: Replica | None, end: float, needless: Callable[[], bool]) -> Iterator[Replica | None]:
        """A replica for the length of the block: one that works rather than not, another than ``last``, the least busy.

        Where none works, the one that may be tried first is waited for; None once ``end`` of the monotonic clock has
        passed or ``needless`` says that nobody needs it any more.
        """
        with self._lock:
            now = time.monotonic()
            replica = min(
                self._replicas, key=lambda each: (max(each.banned_until, now), each is last, each.load, id(each))
            )
            replica.load += 1
        try:
            while (wait_s := min(replica.banned_until, end) - time.monotonic()) > 0 and not needless():
                time.sleep(min(wait_s, FIRST_BACKOFF_S))
            yield None if needless() or time.monotonic() >= end else replica
        finally:
            with self._lock:
                replica.load -= 1

    def close(self) -> None:
        """Close all connections."""
        for replica in self._replicas:
            replica.http.close()
