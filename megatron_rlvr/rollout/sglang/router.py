"""sglang-router in front of the servers: generation goes through it, control goes to each server."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from megatron_rlvr.core import RLVRError
from megatron_rlvr.rollout.sglang.client import SGLangClient, SGLangError
from megatron_rlvr.rollout.sglang.server import HOST, Launched

WORKER_TIMEOUT_S = 60.0
_POLL_S = 0.2


class RouterClient(SGLangClient):
    """Talks to a router: `generate`, `health`, and which servers it sends to."""

    def workers(self) -> dict[str, str]:
        """Id of every server the router knows, by URL."""
        reply = self._object("/workers", self._get("/workers"))
        return {worker["url"].rstrip("/"): worker["id"] for worker in reply["workers"]}

    def add(self, url: str) -> None:
        """Send to the server at ``url`` too; returns once the router does.

        Raises:
            RLVRError: If it has not taken the server within `WORKER_TIMEOUT_S`.
        """
        if url not in self.workers():
            self._post("/workers", {"url": url})
        self._until(lambda: url in self.workers(), f"take {url}")

    def remove(self, url: str) -> None:
        """Send no more to the server at ``url``; returns once the router does not.

        Raises:
            RLVRError: If it has not let the server go within `WORKER_TIMEOUT_S`.
        """
        if worker := self.workers().get(url):
            try:
                self._delete(f"/workers/{worker}")
            except SGLangError as error:
                if error.status != 404:  # gone already
                    raise
        self._until(lambda: url not in self.workers(), f"let go of {url}")

    def _until(self, done: Callable[[], bool], what: str) -> None:
        """Return once the router has done in the background what it was told."""
        deadline = time.monotonic() + WORKER_TIMEOUT_S
        while not done():
            if time.monotonic() > deadline:
                raise RLVRError(f"the router at {self.url} did not {what} within {WORKER_TIMEOUT_S:g} s; see its log")
            time.sleep(_POLL_S)


def sglang_router(python: Path, log: Path) -> Launched:
    """A router without servers, not started yet, which gives every server the same number of requests.

    Its usual policy sends what is like an earlier prompt to the same server again, so one that comes later gets hardly
    any. It never retries: the fleet does, and knows what it replaces.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        metrics_port = free.getsockname()[1]
    flags = ["--policy", "round_robin", "--disable-retries", "--log-level", "warn", "--prometheus-host", HOST]
    flags += ["--prometheus-port", str(metrics_port)]
    return Launched(python, ["-m", "sglang_router.launch_router", *flags], {}, log)
