"""Finding and killing what a run started, for backends without a pid namespace."""

from __future__ import annotations

import contextlib
import os
import signal


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:  # It has just ended.
        return []


def descendants(pid: int) -> list[int]:
    """``pid`` and all that descend from it through living parents."""
    found = [pid]
    for member in found:
        found.extend(_children(member))
    return found


def kill_group(leader: int) -> None:
    """Kill a whole process group at once; nothing happens when it is gone. Never our own."""
    if leader > 1 and leader != os.getpgrp():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def kill_children() -> None:
    """Kill all descendants of this process, a subreaper, until none is left."""
    while children := _children(os.getpid()):
        for child in children:
            for member in descendants(child):
                # Whole groups at once, for a group that forks as fast as it is killed one by one never ends.
                with contextlib.suppress(ProcessLookupError):
                    kill_group(os.getpgid(member))
        for _ in children:
            os.waitpid(-1, 0)


def threads_of_user(uid: int) -> int:
    """How many threads the kernel counts for ``uid``, as far as /proc shows."""
    total = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == uid:
                    total += len(os.listdir(f"/proc/{name}/task"))
            except OSError:  # It has just ended.
                continue
    return total
