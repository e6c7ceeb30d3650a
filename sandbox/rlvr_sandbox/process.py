"""The pool's handle on one worker process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlvr_sandbox.verdicts import Judgement, SandboxError, Trust, Verdict
from rlvr_sandbox.worker import READY

START_TIMEOUT_S = 60.0


class WorkItem(NamedTuple):
    """One item as it travels to a worker: its kind, the response and the spec, already validated."""

    kind: str
    response: str
    spec: Mapping[str, Any]


class Clock(NamedTuple):
    """CPU time of a worker and wall time, both in seconds."""

    cpu_s: float
    wall_s: float


class WorkerProcess:
    """A running worker: send it a chunk, collect its judgements, read its CPU clock, kill it.

    Attributes:
        begun: Whether it is known to have begun with the chunk that it was sent last.
    """

    def __init__(self, process: Process) -> None:
        """Wrap a started ``process`` that has pipes for stdin and stdout."""
        if process.stdin is None or process.stdout is None:
            raise ValueError("a worker process needs pipes for stdin and stdout")
        self._process = process
        self._stdin, self._stdout = process.stdin, process.stdout
        self._tail = b""
        self._ended = False
        self.begun = False

    @classmethod
    async def spawn(cls) -> WorkerProcess:
        """Start a worker and wait until it is ready.

        Raises:
            SandboxError: If it ends or stays silent instead.
        """
        # A fixed hash seed keeps sympy's orderings, hence verdicts, the same from worker to worker.
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "rlvr_sandbox.worker",
            stdin=PIPE,
            stdout=PIPE,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        worker = cls(process)
        if await worker._lines(START_TIMEOUT_S) != [READY]:
            await worker.kill()
            raise SandboxError(
                f"a worker process did not start (exit status {process.returncode}); "
                "see its message above and check that math-verify can be imported"
            )
        return worker

    @property
    def ended(self) -> bool:
        """Whether the worker is known to have died."""
        return self._ended or self._process.returncode is not None

    def send(self, items: Sequence[WorkItem]) -> None:
        """Hand over a chunk; a worker that died meanwhile shows by ``ended`` after the next ``judgements``."""
        self.begun = False
        self._stdin.write(json.dumps(items).encode() + b"\n")

    async def judgements(self, timeout_s: float) -> list[Judgement]:
        """The judgements that arrived since the last call, in order; waits ``timeout_s`` for the first."""
        lines = await self._lines(timeout_s)
        self.begun = self.begun or READY in lines
        return [
            Judgement(Verdict(verdict), detail, seconds, Trust(trust), tuple(flags))
            for verdict, detail, seconds, trust, flags in map(json.loads, (line for line in lines if line != READY))
        ]

    async def _lines(self, timeout_s: float) -> list[bytes]:
        try:
            async with asyncio.timeout(timeout_s):
                data = await self._stdout.read(1 << 16)
        except TimeoutError:
            return []
        self._ended = not data
        *lines, self._tail = (self._tail + data).split(b"\n")
        return lines

    def clock(self) -> Clock:
        """The worker's CPU clock and the wall clock now; a worker without a CPU clock is known dead from then on."""
        try:
            # Linux: the clock id of another process is (~pid << 3) | CPUCLOCK_SCHED, see clock_getcpuclockid(3).
            cpu_s = time.clock_gettime((~self._process.pid << 3) | 2)
        except OSError:
            self._ended = True
            cpu_s = 0.0
        return Clock(cpu_s, time.monotonic())

    async def kill(self) -> None:
        """End the worker now and reap it; nothing happens when it is dead already."""
        self._ended = True
        if self._process.returncode is None:
            self._process.kill()
        self._stdin.close()
        await self._process.wait()
