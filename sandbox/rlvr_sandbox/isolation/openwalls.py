"""Walls without namespaces: none at all, or those of landlock and seccomp."""

from __future__ import annotations

import math
import os
import tempfile
import time
from typing import Any

from rlvr_sandbox.isolation import kernel, landlock, limits, proctree, rootfs, workdir
from rlvr_sandbox.isolation.identity import ids_of_slot
from rlvr_sandbox.isolation.messages import Order
from rlvr_sandbox.isolation.seccomp import Filters

_COUNT_AGE_S = 2.0


LEADER = "leader"
"""The file in a slot's directory that tells the janitor whom to kill with the slot: a process group, or 0."""


class OpenWalls:
    """A directory of its own and limits; a program that means harm does it."""

    def __init__(self, root: str, leaky: bool = True) -> None:
        self.leaky = leaky
        self._root = root
        self._place = ""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._note = os.open(os.path.join(root, LEADER), flags, 0o600) if leaky else -1
        self._beside, self._counted = 0, -math.inf
        self._bounds = limits.Bounds()
        # What a run leaves behind becomes ours to kill.
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)

    def before_fork(self) -> None:
        """Make the run's directory."""
        self._place = tempfile.mkdtemp(dir=self._root)
        if time.monotonic() - self._counted > _COUNT_AGE_S:
            self._beside, self._counted = self._count(), time.monotonic()

    def after_fork(self, pid: int) -> None:
        """Note whom to kill should the zygote be killed."""
        self._tell(pid)

    def workspace(self, order: Order) -> str:
        """The directory made before the fork."""
        os.environ.update(HOME=self._place, TMPDIR=self._place)
        return self._place

    def confine(self, order: Order) -> None:
        """Set the limits."""
        self._bounds.apply(order, beside=self._beside)
        limits.prefer_for_killing()
        kernel.die_with_parent()

    def _count(self) -> int:
        """Threads that count against the limit of processes but are not the run's."""
        return proctree.threads_of_user(os.getuid())

    def processes(self, pid: int) -> list[int]:
        """All that descends from the zygote, which adopts what the leader leaves."""
        return proctree.descendants(os.getpid())[1:]

    def disk_bytes(self) -> int:
        """The bytes in the run's directory."""
        return workdir.disk_bytes(self._place)

    def clean(self, leader: int) -> None:
        """Kill what outlived the leader and remove the directory."""
        proctree.kill_group(leader)
        proctree.kill_children()
        self._tell(0)
        if self._place:
            workdir.remove(self._place)
        self._place = ""

    def _tell(self, leader: int) -> None:
        if self.leaky:
            os.pwrite(self._note, b"%010d" % leader, 0)


class LandlockWalls(OpenWalls):
    """Landlock and seccomp around each run; as root another user too."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Find out what this kernel offers.

        Raises:
            OSError: If it has no landlock.
        """
        # Inside bubblewrap the pid namespace dies as a whole, and its pids are those of others outside.
        super().__init__(config["workspace"], leaky=config["backend"] == "landlock")
        self._abi = landlock.version()
        if not self._abi:
            raise OSError("this kernel has no landlock (Linux 5.13 and later, where it is among the security modules)")
        self._filters = Filters(shared=True)
        self._readable = rootfs.readable(config["prefixes"])
        self._id = 0
        if config["backend"] == "landlock" and os.geteuid() == 0:
            closed = [prefix for prefix in config["prefixes"] if not _open_to_all(prefix)]
            if closed:
                raise OSError(
                    f"the interpreter in {closed[0]} is closed to the user that programs run as; install it where "
                    "every user can read it, or start the service as an ordinary user"
                )
            self._id = ids_of_slot(config["slot"])[1]

    def workspace(self, order: Order) -> str:
        """The directory made before the fork, given to the run's user."""
        if self._id:
            os.chown(self._place, self._id, self._id)
        return super().workspace(order)

    def confine(self, order: Order) -> None:
        """Limits, identity, capabilities, files, system calls; in this order, for each needs what the next takes."""
        rules = landlock.Ruleset(self._abi)
        for path in (*self._readable, "/proc/self"):
            rules.allow(path, landlock.READ)
        rules.allow(self._place, landlock.WORK)
        for device in rootfs.DEVICES:
            rules.allow(f"/dev/{device}", landlock.DEVICE)
        super().confine(order)
        if self._id:
            kernel.drop_bounding_set()
            os.setgroups([])
            os.setresgid(self._id, self._id, self._id)
            os.setresuid(self._id, self._id, self._id)
            kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        kernel.die_with_parent()
        rules.restrict()
        self._filters.install(order)

    def _count(self) -> int:
        return 0 if self._id else super()._count()


def _open_to_all(path: str) -> bool:
    """Whether every user can reach ``path`` and read it."""
    parts = os.path.abspath(path).split("/")
    return all(os.stat("/".join(parts[:end]) or "/").st_mode & 0o5 == 0o5 for end in range(1, len(parts) + 1))
