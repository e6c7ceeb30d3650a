"""uvicorn around the application: says when it listens, drains when it is told to go."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from types import FrameType

import uvicorn

from rlvr_sandbox.api import create_app
from rlvr_sandbox.bench import Bench
from rlvr_sandbox.verdicts import SandboxError

# Answers that are written once every item has been judged or given up.
GRACE_S = 5
DRAIN_TICK_S = 0.05
BACKLOG = 2_048


class Server(uvicorn.Server):
    """uvicorn, saying where it listens once it does, and letting requests end after SIGTERM.

    SIGTERM makes ``/readyz`` answer 503 and refuses new items, but gives those at hand ``drain_s`` seconds. SIGINT and
    the end of stdin give them none.
    """

    def __init__(self, bench: Bench, *, drain_s: float, busy_status: int, announcement: str) -> None:
        """Serve ``bench``; ``announcement`` is printed below the line that says where."""
        app = create_app(bench, busy_status)
        super().__init__(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_S, backlog=BACKLOG, lifespan="off")
        )
        self._bench = bench
        self._drain_s = drain_s
        self._announcement = announcement
        self._patient = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving on ``sockets``, then print the line that callers wait for and the announcement."""
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            print(f"rlvr-sandbox listening on http://{host}:{port}\n{self._announcement}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Remember whether there is time; a second signal means that there is none."""
        self._patient = sig == signal.SIGTERM and not self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests end where there is time, refuse the rest, then stop serving."""
        self._bench.drain()
        end = asyncio.get_running_loop().time() + self._drain_s
        while self._patient and self._bench.pending and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(DRAIN_TICK_S)
        self._bench.stop()
        await super().shutdown(sockets)

    def stop_at_end_of_stdin(self) -> None:
        """Block until stdin ends, then let the server finish."""
        while os.read(0, 4096):
            pass
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        SandboxError: If the address is taken or not of this machine.
    """
    try:
        listener = socket.create_server((host, port), backlog=BACKLOG)
    except OSError as error:
        raise SandboxError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port, or 0 for a free one"
        ) from error
    # asyncio does this only for sockets that name their protocol; without it every reply waits 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
