"""The limits that the kernel keeps for us, set in the run before its program starts."""

from __future__ import annotations

import math
import os
import resource

from rlvr_sandbox.isolation.messages import Order

THREADS = 64
STACK_BYTES = 256 << 20
_DESCRIPTORS = 64
_COMPILER_DESCRIPTORS = 256
_SLACK_BYTES = 256 << 20
_ADDRESS_SLACK_BYTES = 4 << 30
_KINDS = (
    *(resource.RLIMIT_CPU, resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE),
    *(resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_STACK),
    *(resource.RLIMIT_DATA, resource.RLIMIT_AS),
)


class Bounds:
    """The limits of one zygote's runs; what is the same for all of them is found out once."""

    def __init__(self) -> None:
        self._ceilings = {kind: resource.getrlimit(kind)[1] for kind in _KINDS}
        self._address, self._data = _used()

    def apply(self, order: Order, beside: int) -> None:
        """Bound this process and what it starts.

        The CPU limit here is a backstop in whole seconds; the zygote measures and judges the exact one.

        Args:
            order: The run.
            beside: Processes of the same user that are not the run's but count with it.
        """
        alone = order.processes == 1
        seconds = math.ceil(order.cpu_s) + 1
        self._set(resource.RLIMIT_CPU, seconds, seconds + 1)
        self._set(resource.RLIMIT_CORE, 0)
        self._set(resource.RLIMIT_MEMLOCK, 0)
        self._set(resource.RLIMIT_MSGQUEUE, 0)
        self._set(resource.RLIMIT_FSIZE, order.disk_bytes)
        self._set(resource.RLIMIT_NOFILE, _DESCRIPTORS if alone else _COMPILER_DESCRIPTORS)
        self._set(resource.RLIMIT_NPROC, beside + (THREADS if alone else order.processes))
        self._set(resource.RLIMIT_STACK, min(STACK_BYTES, order.memory_bytes))
        if order.address_space:
            self._set(resource.RLIMIT_DATA, self._data + order.memory_bytes + _SLACK_BYTES)
            self._set(resource.RLIMIT_AS, self._address + order.memory_bytes + _ADDRESS_SLACK_BYTES)

    def _set(self, kind: int, soft: int, hard: int | None = None) -> None:
        """Set a limit, or as much of it as the inherited one permits."""
        hard = soft if hard is None else hard
        ceiling = self._ceilings[kind]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def prefer_for_killing() -> None:
    """Should memory run out, the kernel is to take this process before the zygote or the service."""
    score = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    os.write(score, b"1000")
    os.close(score)


def _used() -> tuple[int, int]:
    """Bytes of address space and of data that this process has now."""
    with open("/proc/self/statm") as file:
        fields = file.read().split()
    page = os.sysconf("SC_PAGESIZE")
    return int(fields[0]) * page, int(fields[5]) * page
