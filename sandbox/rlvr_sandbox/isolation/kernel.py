"""System calls that Python does not offer, by ctypes; every failure is an ``OSError`` that names the call."""

from __future__ import annotations

import ctypes
import os
import platform
import signal

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47

_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_LAST_CAPABILITY = 40
_CAPABILITY_VERSION_3 = 0x20080522

# Calls without a wrapper in the C library. From 424 on all architectures share one numbering.
_OWN_NUMBERS = {
    "x86_64": {"capset": 126, "pivot_root": 155, "seccomp": 317},
    "aarch64": {"capset": 91, "pivot_root": 41, "seccomp": 277},
}
_SHARED_NUMBERS = {
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}

# Made here, for in a run every new type of ctypes would cost as much as the call itself.
_CAPABILITIES = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
_NONE = (ctypes.c_uint32 * 6)()

libc = ctypes.CDLL(None, use_errno=True)


class UnsupportedMachineError(OSError):
    """This processor has no table of system calls here."""


def machine() -> str:
    """The processor's name, where its system calls are known.

    Raises:
        UnsupportedMachineError: Otherwise.
    """
    name = platform.machine()
    if name not in _OWN_NUMBERS:
        raise UnsupportedMachineError(f"no system call table for {name}; x86_64 and aarch64 have one")
    return name


def check(result: int, call: str) -> int:
    """``result`` unless it tells of a failure.

    Raises:
        OSError: If it does, with the error number and ``call``.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def syscall(call: str, *arguments: object) -> int:
    """Make a system call by its name; integers and ctypes pointers are passed on, each as a whole register."""
    number = _SHARED_NUMBERS.get(call) or _OWN_NUMBERS[machine()][call]
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return check(int(libc.syscall(ctypes.c_long(number), *words)), call)


def prctl(option: int, value: int = 0) -> int:
    """``prctl(option, value, 0, 0, 0)``."""
    zero = ctypes.c_ulong(0)
    return check(int(libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero)), f"prctl({option})")


def unshare(flags: int) -> None:
    """Leave the namespaces named by ``flags`` for new ones."""
    check(libc.unshare(flags), f"unshare({flags:#x})")


def setns(descriptor: int, kind: int) -> None:
    """Enter the namespace behind ``descriptor``."""
    check(libc.setns(descriptor, kind), "setns")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """``mount(2)``; empty ``kind`` and ``data`` are passed as null."""
    words = [word.encode() if word else None for word in (kind, data)]
    check(
        libc.mount(source.encode(), target.encode(), words[0], ctypes.c_ulong(flags), words[1]),
        f"mount({source} on {target})",
    )


def detach(target: str) -> None:
    """Unmount ``target`` and all below it, at once for the eye and later for the kernel."""
    check(libc.umount2(target.encode(), MNT_DETACH), f"umount({target})")


def set_mount_attributes(target: str, attributes: int, recursive: bool = True) -> None:
    """Add attributes to the mount at ``target``, and where ``recursive`` to all below it (Linux 5.12)."""
    words = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    syscall("mount_setattr", _AT_FDCWD, ctypes.c_char_p(target.encode()), flags, ctypes.byref(words), 32)


def pivot_root(new_root: str) -> None:
    """Make ``new_root`` the root and forget the old one."""
    os.chdir(new_root)
    dot = ctypes.c_char_p(b".")
    syscall("pivot_root", dot, dot)
    detach(".")
    os.chdir("/")


def drop_bounding_set() -> None:
    """Make sure that no program executed from here on gains a capability."""
    for capability in range(_LAST_CAPABILITY + 1):
        prctl(PR_CAPBSET_DROP, capability)


def drop_capabilities() -> None:
    """Give up every capability that this process has."""
    syscall("capset", ctypes.byref(_CAPABILITIES), ctypes.byref(_NONE))


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies; lost when the uid changes."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
