"""The service's handle on one slot: a zygote process, and the run that it has in hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import struct
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from typing import Any

from rlvr_sandbox.isolation.cgroups import Group
from rlvr_sandbox.isolation.messages import CLOCK, KILL, MAX_MESSAGE, WARM, Clock, Leader, Order, Report, decode_answer
from rlvr_sandbox.isolation.proctree import kill_group
from rlvr_sandbox.languages import TOOL_PATH
from rlvr_sandbox.verdicts import SandboxError

START_TIMEOUT_S = 60.0
RUNS_PER_ZYGOTE = 5000
ZYGOTE_AGE_S = 3600.0
_REAP_S = 0.5
_RELEASES = 50
_RELEASE_S = 0.01

_BOOT = (
    "import json, sys; config = json.loads(sys.argv[2]); sys.path[:] = config['imports'];"
    "from rlvr_sandbox.isolation import forks; forks.note();"
    "from {module} import main; main(int(sys.argv[1]), config)"
)
# Rewards must not depend on the service's environment, nor programs see it.
_ENVIRONMENT = {
    "PATH": TOOL_PATH,
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

logger = logging.getLogger(__name__)


class SlotBrokenError(SandboxError):
    """The slot's zygote died, hangs or could not raise its walls; the run in hand says nothing of its program."""


class Slot:
    """One zygote. It has at most one run in hand; ``ended`` is set once it must be replaced."""

    def __init__(self, process: Process, control: socket.socket, words: int, group: Group | None) -> None:
        self.ended = asyncio.Event()
        self.reason = ""
        self._process = process
        self._control = control
        self._words = words
        self._group = group
        self._pid = process.pid
        self._handle = -1
        self._leader = 0
        self._runs = 0
        self._born = time.monotonic()
        self._report: asyncio.Future[Report] | None = None
        self._clock: asyncio.Future[Clock] | None = None

    @classmethod
    async def spawn(cls, prefix: list[str], module: str, config: dict[str, Any], group: Group | None = None) -> Slot:
        """Start a zygote and wait until it is warm.

        Args:
            prefix: A command to start it under; empty for none.
            module: Its module.
            config: What it needs to know.
            group: The cgroup of its runs, which goes with the slot.

        Raises:
            SandboxError: If it ends or stays silent instead, with its last words.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        # The kernel adds the sender's pid as we see it, whatever namespaces the zygote is in.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        boot = [sys.executable, "-s", "-S", "-P", "-c", _BOOT.format(module=module), str(theirs.fileno())]
        with theirs:
            words = os.memfd_create("last words", os.MFD_CLOEXEC)
            process = await asyncio.create_subprocess_exec(
                *prefix,
                *boot,
                json.dumps(config),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=words,
                env=_ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        slot = cls(process, ours, words, group)
        try:
            await slot._await_warmth()
        except BaseException:
            await slot.kill()
            raise
        return slot

    async def _await_warmth(self) -> None:
        """Wait until the zygote is warm."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._control, readable.set)
        message = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(START_TIMEOUT_S):
                await readable.wait()
                message, credentials, _, _ = self._control.recvmsg(MAX_MESSAGE, 256)
        loop.remove_reader(self._control)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        if message != WARM:
            self._kill_now()
            await self._process.wait()
            words = os.pread(self._words, 1 << 16, 0).decode(errors="replace").strip()
            raise SandboxError(
                f"a sandbox slot did not start: {words.splitlines()[-1] if words else 'it said nothing'}"
            )
        self._pid = struct.unpack("iii", credentials[0][2])[0]
        self._handle = os.pidfd_open(self._pid)
        loop.add_reader(self._control, self._hear)

    @property
    def busy(self) -> bool:
        """Whether a run is in hand."""
        return self._report is not None

    @property
    def pids(self) -> tuple[int, ...]:
        """The zygote's process and the one that it was started as, which may be the same."""
        return (self._pid, self._process.pid)

    def start(self, order: Order, descriptors: list[int]) -> asyncio.Future[Report]:
        """Hand over an order; the future has its report, or ``SlotBrokenError``."""
        self._report = asyncio.get_running_loop().create_future()
        self._runs += 1
        report = self._report
        try:
            joins = self._group.admit(order) if self._group is not None else []
            socket.send_fds(self._control, [order.encode()], [*descriptors, *joins])
        except OSError as error:
            self.fail(f"the order could not be given: {error}")
        return report

    def ask_to_kill(self) -> None:
        """Have the run in hand killed; its report follows."""
        self._send(KILL)

    async def clock(self) -> Clock | None:
        """What the run in hand has used so far; ``None`` once it has ended."""
        if self._report is None:
            return None
        self._clock = asyncio.get_running_loop().create_future()
        self._send(CLOCK)
        waits: list[asyncio.Future[Clock] | asyncio.Future[Report]] = [self._clock, self._report]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        return self._clock.result() if self._clock.done() else None

    async def idle(self) -> None:
        """Wait until no run is in hand; one that fails counts as ended."""
        if self._report is not None:
            await asyncio.wait([self._report])

    @property
    def worn(self) -> bool:
        """Whether the zygote has served long enough."""
        return self._runs >= RUNS_PER_ZYGOTE or time.monotonic() - self._born > ZYGOTE_AGE_S

    def check(self) -> None:
        """Find out whether the zygote is stopped or dead, and end the slot if so."""
        for pid in self.pids:
            try:
                with open(f"/proc/{pid}/stat") as file:
                    state = file.read().rpartition(")")[2].split()[0]
            except OSError:
                state = "X"
            if state in "TtXZ":
                self.fail(f"its zygote is in state {state}")
                return

    def fail(self, reason: str) -> None:
        """End the slot; a run in hand hears of it."""
        if self.ended.is_set():
            return
        self.reason = reason
        self.ended.set()
        asyncio.get_running_loop().remove_reader(self._control)
        self._kill_now()
        kill_group(self._leader)
        report, self._report = self._report, None
        if report is not None and not report.done():
            report.set_exception(SlotBrokenError(reason))
            report.exception()  # Nobody may be waiting for it any more.

    async def kill(self) -> None:
        """End the zygote and all that it runs, and reap it."""
        self.fail("it was closed")
        self._kill_now()
        try:
            async with asyncio.timeout(_REAP_S):
                await self._process.wait()
        except TimeoutError:  # The outer process of the two is stopped.
            self._process.kill()
            await self._process.wait()
        self._control.close()
        for descriptor in (self._handle, self._words):
            if descriptor >= 0:
                os.close(descriptor)
        self._handle = self._words = -1
        await self._release_group()

    async def _release_group(self) -> None:
        """Remove the cgroup, waiting a moment for the dead in it to go; what remains is swept later."""
        for _ in range(_RELEASES):
            if self._group is None or self._group.release():
                return
            await asyncio.sleep(_RELEASE_S)

    def _kill_now(self) -> None:
        if self._handle < 0:
            if self._process.returncode is None:
                self._process.kill()
            return
        try:
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _send(self, message: bytes) -> None:
        try:
            self._control.send(message)
        except BlockingIOError:  # A zygote that leaves its socket full is stuck; the guards see to it.
            logger.warning("a sandbox slot does not read its orders")
        except OSError as error:
            self.fail(f"its socket broke: {error}")

    def _hear(self) -> None:
        try:
            message = self._control.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self.fail("its zygote died")
            return
        answer = decode_answer(message)
        if isinstance(answer, Leader):
            self._leader = answer.leader
            return
        if isinstance(answer, Clock):
            if self._clock is not None and not self._clock.done():
                self._clock.set_result(answer)
            return
        self._leader = 0
        report, self._report = self._report, None
        if report is not None and not report.done():
            report.set_result(answer)
