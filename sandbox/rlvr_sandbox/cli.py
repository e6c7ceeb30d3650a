"""The command line of the service."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import threading
from collections.abc import Sequence

import uvicorn

from rlvr_sandbox.api import create_app
from rlvr_sandbox.pool import Pool
from rlvr_sandbox.verdicts import SandboxError

GRACE_S = 5


class _Server(uvicorn.Server):
    """uvicorn, saying where it listens once it does, and stopping at once although requests may be waiting."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(uvicorn.Config(create_app(pool), log_level="warning", timeout_graceful_shutdown=GRACE_S))
        self._pool = pool

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving on ``sockets``, then print the one line that callers wait for."""
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            print(f"rlvr-sandbox listening on http://{host}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse the requests that wait for verdicts, then stop serving."""
        self._pool.stop()
        await super().shutdown(sockets)

    def stop_at_end_of_stdin(self) -> None:
        """Block until stdin ends, then let the server finish."""
        while os.read(0, 4096):
            pass
        self.should_exit = True


async def _serve(options: argparse.Namespace) -> None:
    try:
        listener = socket.create_server((options.host, options.port))
    except OSError as error:
        raise SandboxError(
            f"cannot listen on {options.host}:{options.port} ({error.strerror or error}); "
            "choose another --port, or 0 for a free one"
        ) from error
    # asyncio does this only for sockets that name their protocol; without it every reply waits 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    async with Pool(workers=options.workers, item_cpu_s=options.item_seconds) as pool:
        server = _Server(pool)
        if options.exit_with_parent:
            threading.Thread(target=server.stop_at_end_of_stdin, daemon=True).start()
        await server.serve(sockets=[listener])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlvr-sandbox", description="Judge responses of a policy over HTTP.")
    serve = parser.add_subparsers(dest="command", required=True).add_parser("serve", help="run the service")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=int, default=0, help="port to listen on; 0 picks a free one (default: 0)")
    default_workers = min(2, os.cpu_count() or 1)
    serve.add_argument(
        "--workers",
        type=int,
        default=default_workers,
        help="worker processes (default: %(default)s)",
    )
    serve.add_argument(
        "--item-seconds", type=float, default=3.0, help="CPU seconds that one item may take (default: %(default)s)"
    )
    serve.add_argument("--exit-with-parent", action="store_true", help="stop when stdin ends")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.workers < 1:
            raise SandboxError(f"--workers is {options.workers}; give at least 1")
        if not 0.1 <= options.item_seconds <= 600:
            raise SandboxError(f"--item-seconds is {options.item_seconds:g}; give 0.1 to 600")
        asyncio.run(_serve(options))
    except KeyboardInterrupt:
        return 130
    except SandboxError as error:
        print(f"rlvr-sandbox: {error}", file=sys.stderr)
        return 1
    return 0
