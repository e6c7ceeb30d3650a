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


def apply(order: Order, beside: int) -> None:
    """Bound this process and what it starts.

    The CPU limit here is a backstop in whole seconds; the zygote measures and judges the exact one.

    Args:
        order: The run.
        beside: Processes of the same user that are not the run's but count with it.
    """
    seconds = math.ceil(order.cpu_s) + 1
    _set(resource.RLIMIT_CPU, seconds, seconds + 1)
    _set(resource.RLIMIT_CORE, 0)
    _set(resource.RLIMIT_MEMLOCK, 0)
    _set(resource.RLIMIT_MSGQUEUE, 0)
    _set(resource.RLIMIT_FSIZE, order.disk_bytes)
    _set(resource.RLIMIT_NOFILE, _DESCRIPTORS if order.processes == 1 else _COMPILER_DESCRIPTORS)
    _set(resource.RLIMIT_NPROC, beside + (THREADS if order.processes == 1 else order.processes))
    _set(resource.RLIMIT_STACK, min(STACK_BYTES, order.memory_bytes))
    if order.address_space:
        size, data = _used()
        _set(resource.RLIMIT_DATA, data + order.memory_bytes + _SLACK_BYTES)
        _set(resource.RLIMIT_AS, size + order.memory_bytes + _ADDRESS_SLACK_BYTES)


def prefer_for_killing() -> None:
    """Should memory run out, the kernel is to take this process before the zygote or the service."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _used() -> tuple[int, int]:
    """Bytes of address space and of data that this process has now, read before the walls hide them."""
    with open("/proc/self/statm") as file:
        fields = file.read().split()
    page = os.sysconf("SC_PAGESIZE")
    return int(fields[0]) * page, int(fields[5]) * page


def _set(kind: int, soft: int, hard: int | None = None) -> None:
    """Set a limit, or as much of it as the inherited one permits."""
    hard = soft if hard is None else hard
    ceiling = resource.getrlimit(kind)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))
