"""Programs per second and CPU-ms per program: the sandbox service, in process, and one subprocess per request.

    python benchmarks/sandbox_throughput.py                       # about 4 minutes on two idle cores
    python benchmarks/sandbox_throughput.py --seconds 2 --timeouts 40

All systems run in turn, several times, against the same client; ratios are within one turn. CPU time is that of the
service and all its processes (this one for "in process"). Then come correct programs of 0.3 CPU seconds with a limit of
2 s, 8 at once on every core: how many are called too slow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlvr_sandbox.execution import Limits, Program
from rlvr_sandbox.isolation import open_executor

HERE = Path(__file__).parent
CORES = os.cpu_count() or 1
OVERSUBSCRIPTION = 8
BATCH = 16
LIMIT_S = 2
FUSION = "subprocess per request, HTTP (SandboxFusion's way)"
OURS = "rlvr-sandbox, HTTP, one a request"
SHORT = "print(int(input()) + 1)  # {n}"
# verl puts these before every function that it has tested.
IMPORTS = (
    "import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools\n"
    "import operator, io, sys, json, typing\n"
)
PROGRAMS = {"bare": SHORT, "imports": IMPORTS + SHORT, "numpy": "import numpy\n" + SHORT}
LONG = "import time\nwhile time.process_time() < 0.3: pass\nprint(int(input()) + 1)  # {n}"

Job = Callable[[int], Awaitable[int]]  # runs programs for client number n; how many were right
numbers = itertools.count()


class Connection:
    """A lean HTTP client, which takes little of the processors that are being measured."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to one request, on a connection that stays."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        reader, writer = self._streams
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
        writer.write(f"{head}\r\n\r\n".encode() + content)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length: ")[2].partition(b"\r")[0])
        return json.loads(await reader.readexactly(length))


def cpu_seconds(pid: int) -> float:
    """Processor time of ``pid``, of its living descendants and of those that they have waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        below = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, below))


class System(NamedTuple):
    """One way of running programs: a process to watch, and a job for a program and its limit."""

    name: str
    pid: int
    job: Callable[[str, float], Job]


def run_code(port: int) -> Callable[[str, float], Job]:
    """One program a request."""

    def job(source: str, limit_s: float) -> Job:
        connections: dict[int, Connection] = {}

        async def run(client: int) -> int:
            n = next(numbers)
            body = {"code": source.format(n=n), "language": "python", "stdin": str(n), "run_timeout": limit_s}
            reply = await connections.setdefault(client, Connection(port)).post("/run_code", body)
            return int((reply.get("run_result") or {}).get("stdout") == f"{n + 1}\n")

        return run

    return job


def verify(port: int) -> Callable[[str, float], Job]:
    """Sixteen programs a request, judged."""

    def item(source: str, limit_s: float) -> dict[str, Any]:
        n = next(numbers)
        tests = [{"stdin": str(n), "stdout": str(n + 1)}]
        spec = {"mode": "stdio", "tests": tests, "extract": False, "limits": {"cpu_s": limit_s}}
        return {"kind": "code", "response": source.format(n=n), "spec": spec}

    def job(source: str, limit_s: float) -> Job:
        connections: dict[int, Connection] = {}

        async def run(client: int) -> int:
            body = {"items": [item(source, limit_s) for _ in range(BATCH)], "deadline_s": 300.0}
            reply = await connections.setdefault(client, Connection(port)).post("/v1/verify", body)
            return sum(result["verdict"] == "accepted" for result in reply["results"])

        return run

    return job


@contextlib.contextmanager
def served(command: list[str], port: int) -> Any:
    """A server in a process of its own, once it answers."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "sandbox"), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        return int(reserved.getsockname()[1])


def ours(slots: int, port: int, numpy: bool = False) -> list[str]:
    """The command of our service, which keeps numpy loaded where its users need it."""
    options = f"--port {port} --workers 1 --slots {slots} --exit-with-parent --drain-seconds 0"
    options += " --numpy" if numpy else ""
    return ["-m", "rlvr_sandbox", "serve", *options.split()]


@contextlib.asynccontextmanager
async def systems(numpy: bool) -> AsyncIterator[list[System]]:
    """All systems, up and warm."""
    baseline, service = free_port(), free_port()
    turns = asyncio.Semaphore(CORES)
    executor = await open_executor("auto", slots=CORES, numpy=numpy)

    def in_process(source: str, limit_s: float) -> Job:
        async def run(_: int) -> int:
            n = next(numbers)
            async with turns:
                outcome = await executor.run(
                    Program("python", source.format(n=n)), Limits(cpu_s=limit_s), str(n).encode()
                )
            return int(outcome.stdout == f"{n + 1}\n".encode())

        return run

    def bare(source: str, limit_s: float) -> Job:
        async def run(_: int) -> int:
            n = next(numbers)
            async with turns:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", source.format(n=n), stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                stdout, _ = await asyncio.wait_for(process.communicate(str(n).encode()), limit_s)
            return int(stdout == f"{n + 1}\n".encode())

        return run

    try:
        with (
            served([str(HERE / "subprocess_server.py"), str(baseline)], baseline) as theirs,
            served(ours(CORES, service, numpy), service) as mine,
        ):
            yield [
                System(FUSION, theirs.pid, run_code(baseline)),
                System("plain subprocess, in process", os.getpid(), bare),
                System(OURS, mine.pid, run_code(service)),
                System(f"rlvr-sandbox, HTTP, batches of {BATCH}", mine.pid, verify(service)),
                System("rlvr-sandbox, in process", os.getpid(), in_process),
            ]
    finally:
        await executor.close()


async def rate(system: System, program: str, clients: int, seconds: float) -> tuple[float, float]:
    """Right answers per second and CPU-ms for each, with so many clients at once."""
    job = system.job(PROGRAMS[program], 10.0)
    await job(0)
    end = time.monotonic() + seconds
    started, cpu_s = time.monotonic(), cpu_seconds(system.pid)

    async def client(number: int) -> int:
        right = 0
        while time.monotonic() < end:
            right += await job(number)
        return right

    right = sum(await asyncio.gather(*map(client, range(clients))))
    spent_s = cpu_seconds(system.pid) - cpu_s
    return right / (time.monotonic() - started), 1000 * spent_s / max(right, 1)


async def false_timeouts(job: Job, count: int) -> int:
    """How many of ``count`` correct programs are not called right."""
    todo = iter(range(count))

    async def client(number: int) -> int:
        return sum([await job(number) for _ in todo])

    return count - sum(await asyncio.gather(*map(client, range(OVERSUBSCRIPTION * CORES))))


async def timeouts(count: int) -> list[str]:
    """The lines of the table of false timeouts."""
    lines = [f"| system, {OVERSUBSCRIPTION} programs at once per core | called too slow |", "|---|---|"]
    fusion, service = free_port(), free_port()
    for name, command, port in (
        (FUSION, [str(HERE / "subprocess_server.py"), str(fusion)], fusion),
        (OURS, ours(OVERSUBSCRIPTION * CORES, service), service),
    ):
        with served(command, port):
            failed = await false_timeouts(run_code(port)(LONG, LIMIT_S), count)
        lines.append(f"| {name} | {failed}/{count} |")
    return lines


async def table(options: argparse.Namespace) -> list[str]:
    """The lines of the table of rates."""
    cells = list(itertools.product(PROGRAMS, options.clients))
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for program in PROGRAMS:
        async with systems(program == "numpy") as candidates:
            for clients, turn in itertools.product(options.clients, range(options.rounds)):
                for system in candidates if turn % 2 == 0 else candidates[::-1]:
                    measured = await rate(system, program, clients, options.seconds)
                    found.setdefault((system.name, program, clients), []).append(measured)
    lines = [
        "| program | clients | system | programs/s | × the first | CPU-ms/program | first's CPU / its |",
        "|---|---|---|---|---|---|---|",
    ]
    for (program, clients), system in itertools.product(cells, candidates):
        pairs = list(zip(found[system.name, program, clients], found[FUSION, program, clients], strict=True))
        speed, cpu_ms, faster, leaner = (
            statistics.median(column)
            for column in zip(*((a[0], a[1], a[0] / b[0], b[1] / max(a[1], 1e-9)) for a, b in pairs), strict=True)
        )
        cell = f"{program} | {clients} | {system.name}"
        lines.append(f"| {cell} | {speed:.1f} | {faster:.1f} | {cpu_ms:.1f} | {leaner:.1f} |")
    return lines


async def main() -> None:
    """Run the benchmark and print, and perhaps keep, its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="turns that every system has")
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--timeouts", type=int, default=200, help="correct programs to look for false timeouts with")
    parser.add_argument("--keep", type=Path, help="file to write the tables to")
    options = parser.parse_args()
    load, lines = os.getloadavg(), await table(options)
    print("\n".join(lines), flush=True)
    shown = len(lines)
    if options.timeouts:
        lines += ["", *await timeouts(options.timeouts)]
    place = f"{platform.machine()}, {CORES} cores, Python {platform.python_version()}, Linux {platform.release()}"
    lines += ["", f"`python benchmarks/sandbox_throughput.py {' '.join(sys.argv[1:])}` on {place}"]
    lines += [
        f"Load average {load[0]:.1f} before and {os.getloadavg()[0]:.1f} after; other jobs may have run beside it."
    ]
    print("\n".join(lines[shown:]))
    if options.keep:
        options.keep.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
