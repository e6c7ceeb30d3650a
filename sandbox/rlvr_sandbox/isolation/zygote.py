"""The warm interpreter of one slot: forks a run for each order, watches it, reports what it saw."""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import select
import signal
import socket
import time
from typing import Any

from rlvr_sandbox.isolation import child, echo, forks, kernel, namespaces
from rlvr_sandbox.isolation.cgroups import Kills
from rlvr_sandbox.isolation.messages import CLOCK, KILL, WARM, Clock, Leader, Order, Report, receive_order
from rlvr_sandbox.isolation.namespaces import NamespaceWalls
from rlvr_sandbox.isolation.openwalls import LandlockWalls, OpenWalls

_MEMORY_TICK_S = 0.05
_MIN_TICK_S = 0.005


class Run:
    """One run in progress, seen from its zygote."""

    def __init__(self, order: Order, pid: int, ready: int, walls: child.Walls, kills: Kills) -> None:
        self._order = order
        self._pid = pid
        self._ready = ready
        self._walls = walls
        self._kills = kills
        self._handle = os.pidfd_open(pid)
        self._started = time.monotonic()
        self._why = ""
        self._peak = 0
        self._used_s = 0.0

    def watch(self, control: socket.socket) -> Report | None:
        """Wait for its end, enforce its limits, answer the service meanwhile; ``None`` if the service is gone."""
        poll = select.poll()
        poll.register(control, select.POLLIN)
        poll.register(self._handle, select.POLLIN)
        while True:
            events = [descriptor for descriptor, _ in poll.poll(self._tick_s() * 1000)]
            if self._handle in events:
                return self._bury()
            if control.fileno() in events and not self._obey(control):
                self._kill("killed")
                return None
            self._enforce()

    def _tick_s(self) -> float:
        """No longer than the CPU limit can last on all processors, nor than memory may go unseen."""
        left = (self._order.cpu_s - self._cpu_s()) / max(1, len(os.sched_getaffinity(0)))
        return min(max(left, _MIN_TICK_S), _MEMORY_TICK_S)

    def _obey(self, control: socket.socket) -> bool:
        message = control.recv(64)
        if message == KILL:
            self._kill("killed")
        elif message == CLOCK:
            control.send(Clock(self._cpu_s(), self._waiting_s()).encode())
        return bool(message)

    def _enforce(self) -> None:
        if self._cpu_s() > self._order.cpu_s:
            self._kill("cpu")
        elif self._resident() > self._order.memory_bytes or self._kills.happened():
            self._kill("memory")
        elif self._order.processes > 1 and len(self._members()) > 2 * self._order.processes:
            self._kill("processes")
        elif self._walls.disk_bytes() > self._order.disk_bytes:
            self._kill("disk")

    def _kill(self, why: str) -> None:
        self._why = self._why or why
        signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def _members(self) -> list[int]:
        return [self._pid] if self._order.processes == 1 else self._walls.processes(self._pid)

    def _cpu_s(self) -> float:
        """CPU seconds of all members and of those that they have waited for."""
        members = self._members()
        total = sum(_clock_s(pid) for pid in members)
        if self._order.processes > 1:
            total += sum(_buried_s(pid) for pid in members)
        self._used_s = max(self._used_s, total)
        return self._used_s

    def _waiting_s(self) -> float:
        """Seconds that its first thread was ready to run but did not; 0 where the kernel does not count them."""
        fields = _read(f"/proc/{self._pid}/schedstat").split()
        return int(fields[1]) / 1e9 if len(fields) == 3 else 0.0

    def _resident(self) -> int:
        page = os.sysconf("SC_PAGESIZE")
        fields = (_read(f"/proc/{pid}/statm").split() for pid in self._members())
        size = page * sum(int(words[1]) for words in fields if words)
        self._peak = max(self._peak, size)
        return size

    def _bury(self) -> Report:
        _, status, usage = os.wait4(self._pid, 0)
        wall_s = time.monotonic() - self._started
        os.close(self._handle)
        note = os.read(self._ready, 512)
        os.close(self._ready)
        fault = "" if note == child.STARTED else note.decode() or "the run died before its walls stood"
        # Processes that died with their namespace are in no usage; what the clocks showed of them is.
        cpu_s = max(usage.ru_utime + usage.ru_stime, self._used_s)
        peak = max(self._peak, usage.ru_maxrss * 1024)
        why = self._why or ("cpu" if cpu_s > self._order.cpu_s else "memory" if peak > self._order.memory_bytes else "")
        if self._kills.happened():
            why = "memory"
        return Report(status, cpu_s, wall_s, peak, why, fault)


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:  # It has just ended, or the walls hide it.
        return ""


def _clock_s(pid: int) -> float:
    """CPU seconds of a process, by the clock id of clock_getcpuclockid(3)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:  # It has just ended.
        return 0.0


def _buried_s(pid: int) -> float:
    """CPU seconds of the children that a process has waited for."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK") if len(fields) > 14 else 0.0


def _guests() -> dict[str, child.Guest]:
    """The guests' entry points; they are imported before the walls rise, behind which this package is not."""
    guests: dict[str, child.Guest] = {"echo": echo.main}
    package = importlib.import_module("rlvr_sandbox.guest")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"rlvr_sandbox.guest.{info.name}")
        if hasattr(module, "main"):
            guests[info.name] = module.main
    return guests


def _walls(config: dict[str, Any]) -> child.Walls:
    if config["backend"] == "ns":
        return NamespaceWalls()
    if config["backend"] in ("landlock", "bwrap"):
        return LandlockWalls(config)
    return OpenWalls(config["workspace"])


def _serve(control: socket.socket, walls: child.Walls, guests: dict[str, child.Guest], path: list[str]) -> None:
    while (received := receive_order(control)) is not None:
        order, descriptors = received
        ready, told = os.pipe()
        kills = Kills(descriptors[order.plumbing :][-1:])
        walls.before_fork()
        pid = os.fork()
        if pid == 0:
            child.live(order, descriptors, told, walls, guests, path)
        walls.after_fork(pid)
        # What tells of kills is needed until the end.
        for descriptor in (told, *descriptors[: max(order.plumbing, len(descriptors) - 1)]):
            os.close(descriptor)
        if walls.leaky:
            control.send(Leader(pid).encode())
        report = Run(order, pid, ready, walls, kills).watch(control)
        kills.close()
        walls.clean(pid)
        if report is None:
            return
        control.send(report.encode())


def main(descriptor: int, config: dict[str, Any]) -> None:
    """Serve orders that arrive on ``descriptor`` until the service closes it."""
    kernel.die_with_parent()
    control = socket.socket(fileno=descriptor)
    guests = _guests()
    if config["backend"] == "ns":
        pid = namespaces.enter(config)
        if pid:
            control.close()
            _, status = os.waitpid(pid, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    walls = _walls(config)
    for name in config["warm"]:
        importlib.import_module(name)
    forks.forget()
    child.prepare()
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("a warm module has started a thread, which no fork survives")
    gc.collect()
    gc.freeze()
    control.send(WARM)
    _serve(control, walls, guests, config["path"])
    os._exit(0)
