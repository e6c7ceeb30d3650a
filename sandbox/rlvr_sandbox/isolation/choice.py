"""Choosing a backend: the first whose walls hold."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any

from rlvr_sandbox.isolation import bubblewrap, cgroups, delegation, rootfs, workdir
from rlvr_sandbox.isolation.executor import SlotExecutor
from rlvr_sandbox.isolation.hierarchies import Places
from rlvr_sandbox.isolation.janitor import Janitor
from rlvr_sandbox.isolation.selftest import prove
from rlvr_sandbox.isolation.slot import Slot
from rlvr_sandbox.verdicts import SandboxError

MENDS = {
    "ns": (
        "let this process make user, mount and pid namespaces (sysctl user.max_user_namespaces, a seccomp profile "
        "that permits unshare and mount, an unmasked /proc)"
    ),
    "landlock": "landlock needs Linux 6.2 or later with landlock among its security modules",
    "bwrap": "install bubblewrap where user namespaces are permitted",
}
_IN_MEMORY = "/dev/shm"
_ROOM_BYTES = 1 << 30
# Those whose cgroup is to go take a moment to die.
_SWEEPS = 50
_SWEEP_S = 0.01
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
    places = delegation.find()
    if isinstance(places, Places):
        # Kernels before 5.16 ask for the rights of the one who joins, which has none.
        try:
            return await _open_with(places, backend, slots, numpy)
        except SandboxError as error:
            places = f"{places}: {error}"
    return await _open_with(places, backend, slots, numpy)


async def _open_with(found: Places | str, backend: str, slots: int, numpy: bool) -> SlotExecutor:
    places = found if isinstance(found, Places) else None
    place = _fast_directory()
    for _ in range(_SWEEPS):
        if places is None or cgroups.sweep(places):
            break
        await asyncio.sleep(_SWEEP_S)
    _sweep(place)
    # The directory is no secret and slots under other users must reach their own below it.
    root = tempfile.mkdtemp(prefix=f"{cgroups.PREFIX}{os.getpid()}-", dir=place)
    os.chmod(root, 0o711)
    janitor = Janitor(root, places)
    executor = SlotExecutor(backend, slots, _spawner(backend, numpy, root, places), janitor)
    try:
        await executor.start()
        held = "no isolation" if backend == "none" else await prove(executor, root)
        executor.report = f"{held}, {places or f'no cgroup ({found})'}"
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
    """Remove what services of our own have left in ``place`` that were killed together with their janitors."""
    for name in filter(cgroups.ownerless, os.listdir(place)):
        path = os.path.join(place, name)
        with contextlib.suppress(OSError):  # Another service or a janitor sweeps it too.
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
