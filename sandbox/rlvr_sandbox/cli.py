"""The command line of the service."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack

from rlvr_sandbox.bench import Bench
from rlvr_sandbox.code_lane import CodeLane
from rlvr_sandbox.isolation import open_executor
from rlvr_sandbox.metrics import Metrics
from rlvr_sandbox.pool import Pool
from rlvr_sandbox.server import Server, listen
from rlvr_sandbox.verdicts import SandboxError

BACKENDS = ("auto", "ns", "landlock", "bwrap", "none")
BUSY_STATUSES = (429, 503, 504)


async def _code_lane(options: argparse.Namespace, metrics: Metrics, stack: AsyncExitStack) -> CodeLane | str:
    """The lane on the backend that was asked for; with ``auto``, why there is none where none is safe here.

    Raises:
        SandboxError: If the backend that was asked for is not safe here.
    """
    try:
        executor = await open_executor(options.backend, slots=options.slots, unsafe=options.unsafe, numpy=options.numpy)
    except SandboxError as error:
        if options.backend != "auto":
            raise
        return str(error)
    stack.push_async_callback(executor.close)
    metrics.backend_info.labels(executor.name).set(1)
    metrics.watch_restarts(lambda: executor.restarts)
    return CodeLane(executor, slots=options.slots, metrics=metrics, report=executor.report)


def _announcement(code: CodeLane | str) -> str:
    if isinstance(code, str):
        return f"rlvr-sandbox runs no code: {code}"
    languages = ", ".join(code.executor.languages)
    return f"rlvr-sandbox backend {code.executor.name}: {code.report}; {code.slots} slots; {languages}"


async def _serve(options: argparse.Namespace) -> None:
    listener = listen(options.host, options.port)
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        code = await _code_lane(options, metrics, stack)
        pool = Pool(workers=options.workers, item_cpu_s=options.item_seconds, metrics=metrics)
        bench = Bench(await stack.enter_async_context(pool), code, metrics)
        server = Server(
            bench,
            drain_s=options.drain_seconds,
            busy_status=options.busy_status,
            announcement=_announcement(code),
        )
        if options.exit_with_parent:
            threading.Thread(target=server.stop_at_end_of_stdin, daemon=True).start()
        # uvicorn sends itself the signal again at its end, when the sandboxes are still there.
        signal.signal(signal.SIGTERM, lambda *_: None)
        await server.serve(sockets=[listener])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlvr-sandbox", description="Judge responses of a policy over HTTP.")
    serve = parser.add_subparsers(dest="command", required=True).add_parser(
        "serve", help="run the service", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    cores = os.cpu_count() or 1
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serve.add_argument("--port", type=int, default=0, help="port to listen on; 0 picks a free one")
    serve.add_argument("--workers", type=int, default=min(2, cores), help="processes that check answers")
    serve.add_argument("--item-seconds", type=float, default=2.5, help="CPU seconds that checking an answer may take")
    serve.add_argument("--backend", choices=BACKENDS, default="auto", help="isolation that programs run under")
    serve.add_argument("--slots", type=int, default=cores, help="programs that run at once")
    serve.add_argument("--numpy", action="store_true", help="keep numpy loaded for programs that import it")
    serve.add_argument("--unsafe", action="store_true", help="allow --backend none, which isolates nothing")
    serve.add_argument(
        "--busy-status",
        type=int,
        choices=BUSY_STATUSES,
        default=504,
        help="what /run_code, /submit, /rm and /verify answer when there is no verdict; verl retries 504 only",
    )
    serve.add_argument("--drain-seconds", type=float, default=20.0, help="time that requests have after SIGTERM")
    serve.add_argument("--exit-with-parent", action="store_true", help="stop when stdin ends")
    return parser


def _check(options: argparse.Namespace) -> None:
    bounds = {"workers": (1, 1024), "slots": (1, 1024), "item_seconds": (0.1, 600), "drain_seconds": (0, 3600)}
    for name, (low, high) in bounds.items():
        value = getattr(options, name)
        if not low <= value <= high:
            raise SandboxError(f"--{name.replace('_', '-')} is {value:g}; give {low:g} to {high:g}")
    if (options.backend == "none") != options.unsafe:
        raise SandboxError(
            f"--backend is {options.backend!r} and --unsafe is {'given' if options.unsafe else 'not given'}; "
            "programs run without isolation only if both say so"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        asyncio.run(_serve(options))
    except KeyboardInterrupt:
        return 130
    except SandboxError as error:
        print(f"rlvr-sandbox: {error}", file=sys.stderr)
        return 1
    return 0
