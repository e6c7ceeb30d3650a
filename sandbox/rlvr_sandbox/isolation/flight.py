"""One run as the service sees it: its pipes, its hang guard, and what came of it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from collections.abc import Sequence

from rlvr_sandbox.execution import Ending, Limits, Outcome
from rlvr_sandbox.isolation.drain import Drain
from rlvr_sandbox.isolation.messages import Order, Report
from rlvr_sandbox.isolation.slot import Slot, SlotBrokenError

STARVED_FACTOR = 6.0
_MIN_WAIT_S = 0.1
_ANSWER_S = 2.0


def wall_limit_s(limits: Limits) -> float:
    """The wall seconds after which a run is considered hung."""
    return limits.wall_s if limits.wall_s is not None else 3 * limits.cpu_s + 2


class Flight:
    """A run in hand. Time counts against its hang guard only while it is ``active``."""

    def __init__(self, slot: Slot, order: Order, limits: Limits, marks: Sequence[bytes]) -> None:
        self._slot = slot
        self._limits = limits
        self._marks = marks
        self._wall_s = wall_limit_s(limits)
        self._why = ""
        self._active_s = 0.0
        self._since = 0.0
        self._pipes = [Drain(limits.output_bytes, lambda: self.kill("output")) for _ in range(2)]
        self.order = order
        self.report: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        self._guard: asyncio.Task[None] | None = None

    def launch(self, payload: bytes, stdin: bytes, channel: int | None = None) -> None:
        """Send the order off with its contents; ``report`` follows."""
        inputs = [sealed(payload, "payload"), sealed(stdin, "stdin")]
        outputs = [pipe.writer for pipe in self._pipes]
        try:
            self.report = self._slot.start(self.order, [*inputs, *outputs, *([] if channel is None else [channel])])
        finally:
            for descriptor in inputs:
                os.close(descriptor)
            for pipe in self._pipes:
                pipe.release_writer()

    def resume(self) -> None:
        """The program is at work from now on."""
        self._since = time.monotonic()
        self._guard = asyncio.get_running_loop().create_task(self._watch())

    def pause(self) -> None:
        """The program waits for us from now on."""
        if self._guard is not None:
            self._guard.cancel()
            self._guard = None
            self._active_s += time.monotonic() - self._since

    def kill(self, why: str) -> None:
        """Have it killed; ``why`` is ``output``, ``hang``, ``starved`` or ``abandoned``."""
        if not self._why and not self.report.done():
            self._why = why
            self._slot.ask_to_kill()

    async def _watch(self) -> None:
        """Kill it once it has been neither running nor waiting for a processor for too long, or starved for ages."""
        wait_s = self._wall_s - self._active_s
        while not self.report.done():
            await asyncio.sleep(max(wait_s, _MIN_WAIT_S))
            clock = await self._ask_clock()
            active_s = self._active_s + time.monotonic() - self._since
            wait_s = self._wall_s - (active_s - clock)
            if active_s > STARVED_FACTOR * self._wall_s:
                self.kill("starved")
            elif wait_s <= 0:
                self.kill("hang")
            if self._why:
                await asyncio.sleep(_ANSWER_S)
                self._slot.fail("its zygote does not obey")

    async def _ask_clock(self) -> float:
        try:
            async with asyncio.timeout(_ANSWER_S + self._wall_s):
                clock = await self._slot.clock()
        except TimeoutError:
            self._slot.fail("its zygote does not answer")
            return 0.0
        return clock.waiting_s if clock is not None else 0.0

    async def land(self) -> Outcome:
        """Wait for the end and say what came of it.

        Raises:
            SlotBrokenError: If the slot ended before the run did, or its walls did not stand.
        """
        try:
            report = await asyncio.shield(self.report)
        finally:
            self.pause()
            if self.report.done():
                self._output = [pipe.close() for pipe in self._pipes]
        if report.fault:
            raise SlotBrokenError(report.fault)
        stdout, stderr = self._output
        ending, detail = self._judge(report, stderr)
        exited = os.WIFEXITED(report.status)
        return Outcome(
            ending=ending,
            exit_status=os.WEXITSTATUS(report.status) if exited else None,
            signal=None if exited else os.WTERMSIG(report.status),
            stdout=stdout,
            stderr=stderr,
            cpu_s=report.cpu_s,
            wall_s=report.wall_s,
            detail=detail,
        )

    def discard(self) -> None:
        """Close the pipes of a run that nobody asks about any more."""
        self.pause()
        for pipe in self._pipes:
            pipe.close()

    def _judge(self, report: Report, stderr: bytes) -> tuple[Ending, str]:
        limits = self._limits
        stops = {
            "output": (Ending.OUTPUT_LIMIT, f"printed more than {limits.output_bytes} bytes"),
            "hang": (Ending.TIME_LIMIT, f"hung: {self._wall_s:g} s passed without the CPU limit being used up"),
            "starved": (Ending.INFRA_ERROR, f"got too little processor time for {STARVED_FACTOR * self._wall_s:g} s"),
            "abandoned": (Ending.INFRA_ERROR, "nobody waited for its end"),
            "cpu": (Ending.TIME_LIMIT, f"more than {limits.cpu_s:g} s of CPU time"),
            "memory": (Ending.MEMORY_LIMIT, f"more than {limits.memory_bytes >> 20} MiB of memory"),
            "processes": (Ending.SIGNALLED, f"more than {self.order.processes} processes at once"),
            "disk": (Ending.OUTPUT_LIMIT, f"wrote more than {limits.disk_bytes} bytes of files"),
        }
        why = self._why or report.why
        if why in stops:
            return stops[why]
        if report.status and any(mark in stderr[-2048:] for mark in self._marks):
            return Ending.MEMORY_LIMIT, f"was refused memory near the limit of {limits.memory_bytes >> 20} MiB"
        if os.WIFEXITED(report.status):
            return Ending.EXITED, ""
        number = os.WTERMSIG(report.status)
        if number == signal.SIGXFSZ:
            return stops["disk"]
        return Ending.SIGNALLED, f"killed by {signal.Signals(number).name}"


def sealed(content: bytes, name: str) -> int:
    """A descriptor of a file in memory that holds ``content`` and can never change."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor
