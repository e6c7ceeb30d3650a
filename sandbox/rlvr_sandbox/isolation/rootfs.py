"""The root that programs see: a read-only tree of what interpreters and compilers need, nothing of the machine's."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rlvr_sandbox.isolation import kernel

WORK = "/box"
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
ETC = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/perl")
DEVICES = ("null", "zero", "full", "random", "urandom")
_PASSWD = "root:x:0:0::/:/bin/sh\nsandbox:x:1000:1000::/box:/bin/sh\n"


def readable(prefixes: Iterable[str]) -> list[str]:
    """Directories and files that programs read, outermost only, without links: system, configuration, interpreters."""
    wanted = [path for path in (*SYSTEM, *ETC, *prefixes) if os.path.exists(path) and not os.path.islink(path)]
    chosen: list[str] = []
    for path in sorted({os.path.normpath(path) for path in wanted}):
        if not any(path == outer or path.startswith(outer + "/") for outer in chosen):
            chosen.append(path)
    return chosen


def enter(base: str, prefixes: Iterable[str]) -> None:
    """Build the tree on a file system in memory at the empty directory ``base`` and make it this process's root.

    The process must be alone in its mount namespace, with the right to mount.

    Raises:
        OSError: If the kernel refuses a step.
    """
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", base, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    for path in SYSTEM:
        if os.path.islink(path):
            os.symlink(os.readlink(path), base + path)
    for path in readable(prefixes):
        _bind(path, base + path)
    for device in DEVICES:
        _bind(f"/dev/{device}", f"{base}/dev/{device}")
    _finish_tree(base)
    kernel.pivot_root(base)
    for path in readable(prefixes):
        kernel.set_mount_attributes(path, kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV)
    kernel.set_mount_attributes("/", kernel.MOUNT_ATTR_RDONLY, recursive=False)


def _finish_tree(base: str) -> None:
    for name in ("proc", WORK[1:]):
        os.makedirs(f"{base}/{name}")
    if not os.path.exists(f"{base}/tmp"):
        os.symlink(WORK, f"{base}/tmp")
    os.symlink(WORK, f"{base}/dev/shm")
    os.symlink("/proc/self/fd", f"{base}/dev/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{base}/dev/{name}")
    os.makedirs(f"{base}/etc", exist_ok=True)
    with open(f"{base}/etc/passwd", "w") as file:
        file.write(_PASSWD)
    # A new proc may only be mounted where one is seen already.
    kernel.mount("/proc", f"{base}/proc", flags=kernel.MS_BIND | kernel.MS_REC)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    kernel.mount(source, target, flags=kernel.MS_BIND | (kernel.MS_REC if os.path.isdir(source) else 0))
