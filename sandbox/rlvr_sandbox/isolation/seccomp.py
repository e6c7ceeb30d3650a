"""The system call filter: an allow-list as a BPF program, assembled by hand."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass

from rlvr_sandbox.isolation import kernel
from rlvr_sandbox.isolation.messages import Order
from rlvr_sandbox.isolation.syscalls import numbers

_LOAD = 0x20
_AND = 0x54
_IF_EQUAL = 0x15
_IF_AT_LEAST = 0x35
_RETURN = 0x06

_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_ERROR = 0x00050000
_REFUSE = _ERROR | errno.EPERM
_ABSENT = _ERROR | errno.ENOSYS

_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NUMBER_AT = 0
_ARCHITECTURE_AT = 4
_ARGUMENTS_AT = 16
_MODE_FILTER = 2
_MAX_JUMP = 255
# Stands for the run's own pid until that is known; no pid is as large.
_SOME_PID = 0x7FFF_FFF1

_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020000
_ANY = 0xFFFFFFFF
# Names, capabilities read, no_new_privs, memory names: nothing that outlives the zygote or loosens anything.
_PRCTL_OPTIONS = (2, 3, 15, 16, 21, 23, 29, 30, 38, 39, 41, 0x53564D41)
# TCGETS, TIOCGWINSZ, TIOCGPGRP, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: no device is to be driven.
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x540F, 0x541B, 0x5421, 0x5450, 0x5451)

Instruction = tuple[int, int, int, int]
Test = tuple[int, int, int]
"""Argument, mask, value: the argument's low word under the mask must be the value."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What a run's filter depends on.

    Attributes:
        executes: Whether new programs may be executed.
        forks: Whether new processes may be made; threads always may.
        shared: Whether the program sees processes and files that are not its own, for want of namespaces: then it may
            signal only itself and change no file's attributes, both of which landlock does not cover, and all that it
            starts stays in its process group, which can be killed at once however fast it grows.
    """

    executes: bool
    forks: bool
    shared: bool


def _word(argument: int) -> int:
    """Offset of an argument's low word; both known machines are little-endian."""
    return _ARGUMENTS_AT + 8 * argument


def _leaf(alternatives: list[list[Test]]) -> list[Instruction]:
    """Allow if all tests of one alternative hold, else refuse."""
    code: list[Instruction] = []
    for tests in alternatives:
        size = 3 * len(tests) + 1
        for index, (argument, mask, value) in enumerate(tests):
            code += [(_LOAD, 0, 0, _word(argument)), (_AND, 0, 0, mask)]
            code.append((_IF_EQUAL, 0, size - 3 * (index + 1), value))
        code.append((_RETURN, 0, 0, _ALLOW))
    return [*code, (_RETURN, 0, 0, _REFUSE)]


def _conditional(profile: Profile, own_pid: int) -> dict[str, list[list[Test]]]:
    """The calls that are allowed with some arguments only, each with its alternatives."""
    clone: list[Test] = [(0, _CLONE_NAMESPACES, 0)]
    if not profile.forks:
        clone.append((0, _CLONE_THREAD, _CLONE_THREAD))
    itself: list[list[Test]] = [[(0, _ANY, own_pid)]] if profile.shared else [[]]
    return {
        "ioctl": [[(1, _ANY, command)] for command in _IOCTL_COMMANDS],
        "prctl": [[(0, _ANY, option)] for option in _PRCTL_OPTIONS],
        "prlimit64": [[(0, _ANY, 0)]],
        # A connected pair of streams cannot be aimed anywhere else, a datagram socket can.
        "socketpair": [[(0, _ANY, 1), (1, 0xF, 1)]],
        "clone": [clone],
        "kill": itself,
        "tgkill": itself,
        "tkill": [] if profile.shared else [[]],
    }


def _verdicts(profile: Profile, own_pid: int, machine: str) -> dict[int, list[Instruction]]:
    """What happens at each known number."""
    allow, refuse = [(_RETURN, 0, 0, _ALLOW)], [(_RETURN, 0, 0, _REFUSE)]
    found: dict[int, list[Instruction]] = {}
    for group in ("files", "memory", "process", "time", "signals", "waiting", "sockets"):
        found.update(dict.fromkeys(numbers(group, machine).values(), allow))
    attributes = refuse if profile.shared else allow
    found.update(dict.fromkeys(numbers("attributes", machine).values(), attributes))
    found.update(dict.fromkeys(numbers("refused", machine).values(), refuse))
    for name, number in numbers("execution", machine).items():
        permitted = profile.executes if name.startswith("exec") else profile.forks
        if name in ("setsid", "setpgid"):
            permitted = profile.forks and not profile.shared
        found[number] = allow if permitted else refuse
    conditions = _conditional(profile, own_pid)
    for name, number in numbers("conditional", machine).items():
        found[number] = _leaf(conditions[name])
    return found


def _tree(spans: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    """A binary search for the span that the loaded number lies in; each span starts at its number."""
    if len(spans) == 1:
        return spans[0][1]
    middle = len(spans) // 2
    left, right = _tree(spans[:middle]), _tree(spans[middle:])
    if len(left) > _MAX_JUMP:
        raise ValueError(f"half of the filter has {len(left)} instructions; a jump passes {_MAX_JUMP}")
    return [(_IF_AT_LEAST, len(left), 0, spans[middle][0]), *left, *right]


def assemble(profile: Profile, own_pid: int, machine: str) -> list[Instruction]:
    """The filter for ``profile`` on ``machine``, for the process ``own_pid``."""
    verdicts = _verdicts(profile, own_pid, machine)
    absent: list[Instruction] = [(_RETURN, 0, 0, _ABSENT)]
    spans: list[tuple[int, list[Instruction]]] = [(0, verdicts.get(0, absent))]
    for number in sorted({*verdicts, *(number + 1 for number in verdicts)} - {0}):
        verdict = verdicts.get(number, absent)
        if verdict != spans[-1][1]:
            spans.append((number, verdict))
    return [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_IF_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        *_tree(spans),
    ]


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


class Filters:
    """The filters of one backend, assembled once."""

    def __init__(self, shared: bool) -> None:
        self._shared = shared
        machine = kernel.machine()
        self._codes = {
            (executes, forks): _compiled(assemble(Profile(executes, forks, shared), _SOME_PID, machine))
            for executes, forks in ((False, False), (True, False), (True, True))
        }
        self._programs = {
            key: _Program(len(code), ctypes.cast(code, ctypes.POINTER(_Instruction)))
            for key, code in self._codes.items()
        }

    def install(self, order: Order) -> None:
        """Put this process under the filter that ``order`` asks for; ``no_new_privs`` must be set."""
        forks = order.processes > 1
        key = (forks or bool(order.argv), forks)
        if self._shared:
            for instruction in self._codes[key]:
                if instruction.k == _SOME_PID:
                    instruction.k = os.getpid()
        arguments = (ctypes.c_ulong(_MODE_FILTER), ctypes.byref(self._programs[key]), *[ctypes.c_ulong(0)] * 2)
        kernel.check(kernel.libc.prctl(kernel.PR_SET_SECCOMP, *arguments), "prctl(PR_SET_SECCOMP)")


def _compiled(code: list[Instruction]) -> ctypes.Array[_Instruction]:
    return (_Instruction * len(code))(*(_Instruction(*instruction) for instruction in code))
