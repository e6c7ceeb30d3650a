"""Choosing a backend: the first whose walls hold."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any

from rlvr_sandbox.isolation import bubblewrap, cgroups, rootfs, workdir
from rlvr_sandbox.isolation.executor import SlotExecutor
from rlvr_sandbox.isolation.hierarchies import Places
from rlvr_sandbox.isolation.selftest import prove
from rlvr_sandbox.isolation.slot import Slot
from rlvr_sandbox.verdicts import SandboxError

MENDS = {
    "ns": (
        "let this process make user, mount and pid namespaces (sysctl user.max_user_namespaces, a seccomp profile "
        "that permits unshare and mount, an unmasked /proc)"
    ),
    "landlock": "use a kernel from 6.2 on with landlock among its security modules",
    "bwrap": "install bubblewrap where user namespaces are permitted",
}
_IN_MEMORY = "/dev/shm"
_ROOM_BYTES = 1 << 30
WARM = [
    "abc",
    "argparse",
    "array",
    "ast",
    "base64",
    "bisect",
    "cmath",
    "collections",
    "collections.abc",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "hashlib",
    "heapq",
    "inspect",
    "io",
    "itertools",
    "json",
    "math",
    "numbers",
    "operator",
    "os",
    "pathlib",
    "pickle",
    "pprint",
    "queue",
    "random",
    "re",
    "statistics",
    "string",
    "struct",
    "sys",
    "textwrap",
    "threading",
    "time",
    "traceback",
    "types",
    "typing",
    "unicodedata",
    "uuid",
    "warnings",
]


async def choose(backend: str, *, slots: int, unsafe: bool, numpy: bool) -> SlotExecutor:
    """An executor behind ``backend``, started and proved; see ``open_executor``."""
    if backend == "none":
        if not unsafe:
            raise SandboxError("backend 'none' isolates nothing; pass unsafe=True if every program is trusted")
        return await _open("none", slots, numpy)
    if backend != "auto":
        if backend not in MENDS:
            raise SandboxError(f"backend {backend!r} is unknown; use auto, {', '.join(MENDS)} or none")
        try:
            return await _open(backend, slots, numpy)
        except SandboxError as error:
            raise SandboxError(f"{error}; {MENDS[backend]}") from error
    reasons = []
    for name in MENDS:
        try:
            return await _open(name, slots, numpy)
        except SandboxError as error:
            reasons.append(f"{error} ({MENDS[name]})")
    raise SandboxError(f"no isolation backend holds on this machine: {'; '.join(reasons)}")


async def _open(backend: str, slots: int, numpy: bool) -> SlotExecutor:
    """An executor that uses cgroups where that works, and else does without."""
    places = cgroups.find()
    if places is not None:
        # Kernels before 5.16 ask for the rights of the one who joins, which has none.
        with contextlib.suppress(SandboxError):
            return await _open_with(places, backend, slots, numpy)
    return await _open_with(None, backend, slots, numpy)


async def _open_with(places: Places | None, backend: str, slots: int, numpy: bool) -> SlotExecutor:
    # The directory is no secret and slots under other users must reach their own below it.
    place = _fast_directory()
    _sweep(place)
    root = tempfile.TemporaryDirectory(prefix=f"{cgroups.PREFIX}{os.getpid()}-", dir=place, ignore_cleanup_errors=True)
    os.chmod(root.name, 0o711)
    name = os.path.basename(root.name)

    def cleanup() -> None:
        root.cleanup()
        if places is not None:
            cgroups.sweep(places, own=name)

    if places is not None:
        cgroups.sweep(places)
    executor = SlotExecutor(backend, slots, _spawner(backend, numpy, root.name, places), cleanup)
    try:
        await executor.start()
        held = "no isolation" if backend == "none" else await prove(executor)
        executor.report = f"{held}, {places or 'no cgroup'}"
    except BaseException:
        await executor.close()
        raise
    return executor


def _fast_directory() -> str:
    """Where to put directories that programs fill: in memory where there is room, else the usual place."""
    try:
        facts = os.statvfs(_IN_MEMORY)
    except FileNotFoundError:
        return tempfile.gettempdir()
    roomy = facts.f_bavail * facts.f_frsize >= _ROOM_BYTES
    return _IN_MEMORY if roomy and os.access(_IN_MEMORY, os.W_OK | os.X_OK) else tempfile.gettempdir()


def _sweep(place: str) -> None:
    """Remove what services of our own that were killed have left in ``place``; each name tells its service's pid."""
    for name in os.listdir(place):
        owner = name.removeprefix(cgroups.PREFIX).split("-")[0]
        path = os.path.join(place, name)
        if not name.startswith(cgroups.PREFIX) or not owner.isdigit() or os.path.exists(f"/proc/{owner}"):
            continue
        with contextlib.suppress(OSError):  # Another service sweeps it too.
            if os.lstat(path).st_uid == os.geteuid():
                for slot in os.listdir(path):
                    workdir.remove(os.path.join(path, slot))
                os.rmdir(path)


def _spawner(backend: str, numpy: bool, root: str, places: Places | None) -> Callable[[int], Awaitable[Slot]]:
    """What starts the slot of a number."""
    prefixes = sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix})
    inside = [os.path.abspath(path) for path in sys.path if path]
    inside = [path for path in inside if any(path.startswith(prefix + "/") for prefix in prefixes)]
    package = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))

    async def spawn(number: int) -> Slot:
        workspace = rootfs.WORK if backend == "bwrap" else os.path.join(root, str(number))
        if backend != "bwrap":
            os.makedirs(workspace, mode=0o711, exist_ok=True)
        config: dict[str, Any] = {
            "backend": backend,
            "slot": number,
            "imports": [*inside, package],
            "path": inside,
            "prefixes": prefixes,
            "warm": [*WARM, *(["numpy"] if numpy else [])],
            "workspace": workspace,
        }
        prefix = bubblewrap.command(prefixes, [package]) if backend == "bwrap" else []
        group = None
        if places is not None:
            try:
                group = cgroups.Group(places, f"{os.path.basename(root)}-{number}-{os.urandom(4).hex()}")
            except OSError as error:
                raise SandboxError(f"a cgroup could not be made: {error}") from error
        return await Slot.spawn(prefix, "rlvr_sandbox.isolation.zygote", config, group)

    return spawn
