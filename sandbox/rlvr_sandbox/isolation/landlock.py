"""Landlock: which files a run may touch, that it may not use TCP, nor signal others; kept by the kernel for good."""

from __future__ import annotations

import ctypes
import os

from rlvr_sandbox.isolation import kernel

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_FIFO = 1 << 10
MAKE_SYM = 1 << 12
TRUNCATE = 1 << 14

READ = EXECUTE | READ_FILE | READ_DIR
WORK = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_FIFO | MAKE_SYM | TRUNCATE | 1 << 13
DEVICE = READ_FILE | WRITE_FILE
_ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE

_CREATE_VERSION = 1
_RULE_PATH_BENEATH = 1
_NET_ALL = 3
_SCOPE_ALL = 3
# Bits of file access that each version of the interface knows.
_KNOWN_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_LATEST_BITS = 16


def version() -> int:
    """The version of the kernel's interface; 0 where landlock is off."""
    try:
        return kernel.syscall("landlock_create_ruleset", 0, 0, _CREATE_VERSION)
    except OSError:
        return 0


_Attributes = ctypes.c_uint64 * 3


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


class Ruleset:
    """What this process may do with files from ``restrict`` on; anything that no rule allows is refused."""

    def __init__(self, abi: int) -> None:
        """Begin with nothing allowed.

        Args:
            abi: What ``version`` answers, at least 1.
        """
        self._handled = (1 << _KNOWN_BITS.get(abi, _LATEST_BITS)) - 1
        words = [self._handled, _NET_ALL if abi >= 4 else 0, _SCOPE_ALL if abi >= 6 else 0]
        size = 8 if abi < 4 else 16 if abi < 6 else 24
        attributes = _Attributes(*words)
        self._descriptor = kernel.syscall("landlock_create_ruleset", ctypes.byref(attributes), size, 0)

    def allow(self, path: str, access: int) -> None:
        """Allow ``access`` to ``path`` and all beneath it; a path that does not exist needs no rule."""
        try:
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            return
        try:
            if not os.path.isdir(path):
                access &= _ON_FILES
            rule = _PathBeneath(access & self._handled, parent)
            kernel.syscall("landlock_add_rule", self._descriptor, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
        finally:
            os.close(parent)

    def restrict(self) -> None:
        """Put this process under the rules; ``no_new_privs`` must be set."""
        kernel.syscall("landlock_restrict_self", self._descriptor, 0)
        os.close(self._descriptor)
