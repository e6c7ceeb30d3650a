"""Control groups, where the service may make them: memory and processes of a run as the kernel counts them.

Each slot has one, below the service's own; only its runs ever join, so that the kernel never takes a zygote for what
a program has used. Version 2 is used where its memory and pids controllers can be had, else version 1, else nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal

from rlvr_sandbox.isolation.hierarchies import Places, read
from rlvr_sandbox.isolation.limits import THREADS
from rlvr_sandbox.isolation.messages import Order

PREFIX = "rlvr-sandbox-"
# A fork pays for the interpreter's pages that it writes to, and for its page tables and other kernel memory.
ALLOWANCE_BYTES = 16 << 20


def sweep(places: Places, own: str = "") -> bool:
    """Remove the cgroups of services that are dead, and those whose names begin with ``own``; whether all are gone."""
    doomed = [
        os.path.join(place, name)
        for place in places.directories
        for name in os.listdir(place)
        if ownerless(name) or (own and name.startswith(own))
    ]
    return all([_remove(path) for path in doomed])


def ownerless(name: str) -> bool:
    """Whether ``name`` is one that a service gives, and that service is dead; each name tells its service's pid."""
    owner = name.removeprefix(PREFIX).split("-")[0]
    return name.startswith(PREFIX) and owner.isdigit() and not os.path.exists(f"/proc/{owner}")


class Group:
    """The cgroup of one slot; in the service."""

    def __init__(self, places: Places, name: str) -> None:
        """Make it.

        Raises:
            OSError: If the kernel refuses.
        """
        self._places = places
        self._memory = os.path.join(places.memory, name)
        self._pids = os.path.join(places.pids, name)
        self._limits = (math.inf, 0)
        self._descriptors: list[int] = []
        try:
            for path in self._paths:
                os.mkdir(path)
                # To move one task, and only that, takes no lock that waits for all processors; version 2 cannot.
                file = "tasks" if places.version == 1 else "cgroup.procs"
                self._descriptors.append(os.open(f"{path}/{file}", os.O_WRONLY | os.O_CLOEXEC))
            events = "memory.oom_control" if places.version == 1 else "memory.events"
            self._descriptors.append(os.open(f"{self._memory}/{events}", os.O_RDONLY | os.O_CLOEXEC))
            if places.version == 2:
                write(f"{self._memory}/memory.oom.group", "1")
        except OSError:
            self.release()
            raise

    @property
    def _paths(self) -> list[str]:
        return sorted({self._memory, self._pids})

    def admit(self, order: Order) -> list[int]:
        """Set the limits for a run; returns what it joins by, then what tells of kills, all of it still ours.

        Its files count as memory where they lie in memory, so that there is room for both.

        Raises:
            OSError: If the kernel refuses.
        """
        memory = order.memory_bytes + order.disk_bytes + ALLOWANCE_BYTES
        self.limit(memory, THREADS if order.processes == 1 else order.processes)
        return self._descriptors

    def limit(self, memory: int, processes: int) -> None:
        """Bound the memory in bytes, swapped or not, and the processes and threads."""
        if self._limits == (memory, processes):
            return
        files = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
        values = [str(memory)] * 2
        if self._places.version == 2:
            files, values = ["memory.max", "memory.swap.max"], [str(memory), "0"]
        elif memory > self._limits[0]:  # The one must never exceed the other.
            files.reverse()
        for file, value in zip(files, values, strict=True):
            if "sw" not in file or os.path.exists(f"{self._memory}/{file}"):
                write(f"{self._memory}/{file}", value)
        write(f"{self._pids}/pids.max", str(processes))
        self._limits = (memory, processes)

    def release(self) -> bool:
        """Close and remove it with all that may be in it; returns whether that is done, else try again."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        return all([_remove(path) for path in self._paths])


class Kills:
    """Whether the kernel has killed for memory since; in the zygote."""

    def __init__(self, events: list[int]) -> None:
        self._events = events
        self._before = self._count()

    def happened(self) -> bool:
        """Whether it has; never without a cgroup."""
        return self._count() > self._before

    def close(self) -> None:
        """Ask no more."""
        for descriptor in self._events:
            os.close(descriptor)

    def _count(self) -> int:
        words = [os.pread(descriptor, 4096, 0).split() for descriptor in self._events]
        return sum(int(count) for line in words for name, count in itertools.pairwise(line) if name == b"oom_kill")


def join(descriptors: list[int]) -> None:
    """Move this process, of one thread, into the cgroups whose members the descriptors list."""
    for descriptor in descriptors:
        os.write(descriptor, b"0")


def _remove(path: str) -> bool:
    """Remove a cgroup; one that is still in use has its processes killed and is to be tried again."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        _kill_all(path)
        return False
    return True


def _kill_all(path: str) -> None:
    with contextlib.suppress(OSError):  # Version 2 does it at once, since Linux 5.14.
        write(f"{path}/cgroup.kill", "1")
        return
    for pid in read(f"{path}/cgroup.procs").split():
        with contextlib.suppress(ProcessLookupError):
            if int(pid) > 0:  # Those of other pid namespaces read as 0.
                os.kill(int(pid), signal.SIGKILL)


def write(path: str, text: str) -> None:
    """Write to a file of the kernel's that exists, in one call.

    Raises:
        OSError: If the kernel refuses.
    """
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
