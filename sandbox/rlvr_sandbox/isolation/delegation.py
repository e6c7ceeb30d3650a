"""Where the cgroups of runs can be made: beside the service's own, once that stands where version 2 wants it.

Version 2 lets a cgroup hand controllers on only while it holds no process itself, unless it is the very first one. So
the service moves into a leaf of the cgroup that it was given, and its runs get theirs beside that leaf. systemd does
the same itself where a unit has ``DelegateSubgroup``; then the cgroup above ours is the one that was given.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time

from rlvr_sandbox.isolation.cgroups import PREFIX, Group, write
from rlvr_sandbox.isolation.hierarchies import CONTROLLERS, Places, locate, read
from rlvr_sandbox.isolation.limits import THREADS
from rlvr_sandbox.isolation.proctree import descendants

LEAF = f"{PREFIX}service"
SYSTEMD = "/run/systemd/system"
_ATTEMPTS = 50
_ATTEMPT_S = 0.01


def find() -> Places | str:
    """The places where this process can make cgroups with limits, or in words why there are none."""
    reasons = []
    for places in locate(read("/proc/self/cgroup"), read("/proc/self/mountinfo")):
        try:
            found = _given(places) if places.version == 2 else places
            _try(found)
        except OSError as error:
            reasons.append(f"{places}: {error}")
        else:
            return found
    return "; ".join(reasons) or "no hierarchy with memory and pids is mounted"


def leave(places: Places) -> None:
    """Give the cgroup back as it was, once nobody but this process, the last of the service, is left in its leaf."""
    leaf = os.path.join(places.memory, LEAF)
    others = [name for name in os.listdir(places.memory) if os.path.isdir(os.path.join(places.memory, name))]
    if places.version != 2 or others != [LEAF] or read(f"{leaf}/cgroup.procs").split() != [str(os.getpid())]:
        return
    with contextlib.suppress(OSError):
        write(f"{places.memory}/cgroup.subtree_control", " ".join(f"-{name}" for name in CONTROLLERS))
        write(f"{places.memory}/cgroup.procs", "0")
        os.rmdir(leaf)


def _try(places: Places) -> None:
    group = Group(places, f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}")
    try:
        group.limit(1 << 30, THREADS)
    finally:
        group.release()


def _given(places: Places) -> Places:
    """The cgroup of version 2 that was given to us, with the controllers available below it.

    Raises:
        OSError: If it is not ours to arrange, lacks controllers, or others live in it.
    """
    place = places.memory
    above = os.path.dirname(place)
    if os.path.basename(place) == LEAF or (not _delegated(place) and _delegated(above)):
        place = above
    elif os.path.isdir(SYSTEMD) and not _delegated(place):
        raise OSError(f"systemd keeps {place} for itself; set Delegate=yes for the unit")
    missing = {*CONTROLLERS} - {*read(f"{place}/cgroup.controllers").split()}
    if missing:
        raise OSError(f"{place} has no controller {' and '.join(sorted(missing))}")
    wanted = {*CONTROLLERS} - {*read(f"{place}/cgroup.subtree_control").split()}
    if wanted:
        _enable(place, " ".join(f"+{name}" for name in sorted(wanted)))
    return Places(2, place, place)


def _delegated(place: str) -> bool:
    """Whether systemd has marked the cgroup as one that others may arrange; systemd.resource-control(5)."""
    for name in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            return os.getxattr(place, name) == b"1"
    return False


def _enable(place: str, wanted: str) -> None:
    control = f"{place}/cgroup.subtree_control"
    try:
        write(control, wanted)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        _make_room(place)
        write(control, wanted)


def _make_room(place: str) -> None:
    """Move the processes of the service from ``place`` into its leaf.

    Raises:
        OSError: If the kernel refuses, or if others live in ``place`` too; then ours are back there.
    """
    leaf = os.path.join(place, LEAF)
    with contextlib.suppress(FileExistsError):
        os.mkdir(leaf)
    ours = {str(pid) for pid in descendants(os.getpid())}
    moved = [pid for pid in read(f"{place}/cgroup.procs").split() if pid in ours]
    _move(moved, leaf)
    others = read(f"{place}/cgroup.procs").split()
    if others:
        _move(moved, place)
        _remove_leaf(leaf)
        raise OSError(
            f"{place} also holds the processes {', '.join(others[:5])}; start the service in a cgroup of its own"
        )


def _move(pids: list[str], place: str) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            write(f"{place}/cgroup.procs", pid)


def _remove_leaf(leaf: str) -> None:
    """Remove the leaf unless another service lives in it; those that have just left it hold it for a moment."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(OSError):
            os.rmdir(leaf)
            return
        if read(f"{leaf}/cgroup.procs"):
            return
        time.sleep(_ATTEMPT_S)
