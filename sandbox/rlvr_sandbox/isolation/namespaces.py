"""The ``ns`` backend: every slot in namespaces of its own, every run in further ones; as root or as anybody else."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from rlvr_sandbox.isolation import kernel, landlock, limits, rootfs
from rlvr_sandbox.isolation.identity import ids_of_slot
from rlvr_sandbox.isolation.messages import Order
from rlvr_sandbox.isolation.seccomp import Filters

_SLOT = (
    kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWNS
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWCGROUP
)
CANDIDATE = 1000
_INODES = 1024


def enter(config: dict[str, Any]) -> int:
    """Start a process in the slot's namespaces, the first of its pid namespace, root of nothing but those.

    Returns 0 in that process and its pid in the caller's, which remains outside only to wait for it.

    Raises:
        OSError: If the kernel refuses a step.
    """
    privileged = os.geteuid() == 0
    if privileged:
        # An interpreter under a closed home cannot be reached once ids are mapped, so the tree comes first.
        kernel.unshare(kernel.CLONE_NEWNS)
        rootfs.enter(config["workspace"], config["prefixes"])
    _unshare_mapped(privileged, config["slot"])
    pid = os.fork()
    if pid:
        return pid
    kernel.die_with_parent()
    if not privileged:
        rootfs.enter(config["workspace"], config["prefixes"])
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    if privileged:
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        kernel.die_with_parent()
    # A change of identity closed /proc/self to us, where a run raises its oom score.
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
    kernel.drop_bounding_set()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    return 0


def _unshare_mapped(privileged: bool, slot: int) -> None:
    """Enter the namespaces with ids mapped: two where we may choose them, else our own."""
    if not privileged:
        uid, gid = os.geteuid(), os.getegid()
        kernel.unshare(_SLOT)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{CANDIDATE} {uid} 1")
        _write("/proc/self/gid_map", f"{CANDIDATE} {gid} 1")
        return
    keeper, runner = ids_of_slot(slot)
    # Only a process outside may map more than its own id, so one is left behind to do it.
    told, tell = os.pipe()
    parent = os.getpid()
    mapper = os.fork()
    if mapper == 0:
        _map_parent(parent, told, tell, f"0 {keeper} 1\n{CANDIDATE} {runner} 1\n")
    kernel.unshare(_SLOT)
    os.close(told)
    os.close(tell)
    _, status = os.waitpid(mapper, 0)
    if status:
        raise OSError(f"ids {keeper} and {runner} cannot be mapped into a user namespace")


def _map_parent(parent: int, told: int, tell: int, ids: str) -> NoReturn:
    """In the process left behind: once the parent has moved, write its maps."""
    os.close(tell)
    os.read(told, 1)
    try:
        _write(f"/proc/{parent}/uid_map", ids)
        _write(f"/proc/{parent}/gid_map", ids)
    except OSError as error:
        print(error, file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


class NamespaceWalls:
    """The walls of one slot; see ``rlvr_sandbox.isolation.child.Walls``."""

    leaky = False

    def __init__(self) -> None:
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._abi = landlock.version()
        self._filters = Filters(shared=False)
        self._mapped = os.getuid() == 0
        self._bounds = limits.Bounds()
        os.environ.update(HOME=rootfs.WORK, TMPDIR=rootfs.WORK)

    def before_fork(self) -> None:
        """The next child begins a pid namespace."""
        kernel.unshare(kernel.CLONE_NEWPID)

    def after_fork(self, pid: int) -> None:
        """Later children would be born into it too; come back."""
        kernel.setns(self._own, kernel.CLONE_NEWPID)

    def workspace(self, order: Order) -> str:
        """A file system in memory, bounded, and a proc of its own, in a mount namespace of its own."""
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
        flags = kernel.MS_NOSUID | kernel.MS_NODEV
        options = f"size={order.disk_bytes},nr_inodes={_INODES},mode=777"
        kernel.mount("tmpfs", rootfs.WORK, "tmpfs", flags, options)
        kernel.mount("proc", "/proc", "proc", flags | kernel.MS_NOEXEC)
        return rootfs.WORK

    def confine(self, order: Order) -> None:
        """Limits, identity, capabilities, files, system calls; in this order, for each needs what the next takes."""
        self._bounds.apply(order, beside=0 if self._mapped else 1)
        limits.prefer_for_killing()
        if self._mapped:
            os.setresgid(CANDIDATE, CANDIDATE, CANDIDATE)
            os.setresuid(CANDIDATE, CANDIDATE, CANDIDATE)
            # So that it may open its own /dev/stdin; nobody else sees it.
            kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
        kernel.drop_capabilities()
        kernel.die_with_parent()
        if self._abi:
            rules = landlock.Ruleset(self._abi)
            rules.allow("/", landlock.READ)
            rules.allow("/dev", landlock.DEVICE)
            rules.allow(rootfs.WORK, landlock.WORK)
            rules.restrict()
        self._filters.install(order)

    def processes(self, pid: int) -> list[int]:
        """All processes of the slot but the zygote, which is the first."""
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]

    def disk_bytes(self) -> int:
        """The file system bounds itself."""
        return 0

    def clean(self, leader: int) -> None:
        """The namespaces died with the run."""
