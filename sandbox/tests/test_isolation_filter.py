from __future__ import annotations

import errno
import itertools
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvr_sandbox.isolation.frames import FrameError, header, receive_frame, send_frame
from rlvr_sandbox.isolation.seccomp import Instruction, Profile, assemble
from rlvr_sandbox.isolation.syscalls import numbers

ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, ABSENT = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
STRICT, OPEN = Profile(False, False, False), Profile(True, True, False)
SHARED = Profile(False, False, True)


def interpret(code: list[Instruction], architecture: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What the kernel's BPF machine answers."""
    words = {0: number, 4: architecture}
    for index, value in enumerate((*arguments, *[0] * (6 - len(arguments)))):
        words[16 + 8 * index] = value & 0xFFFFFFFF
        words[20 + 8 * index] = value >> 32 & 0xFFFFFFFF
    accumulator, at = 0, 0
    while True:
        operation, if_true, if_false, value = code[at]
        at += 1
        if operation == 0x20:
            accumulator = words[value]
        elif operation == 0x54:
            accumulator &= value
        elif operation in (0x15, 0x35):
            holds = accumulator == value if operation == 0x15 else accumulator >= value
            at += if_true if holds else if_false
        else:
            assert operation == 0x06
            return value


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("profile", [Profile(*flags) for flags in itertools.product([False, True], repeat=3)])
def test_every_number_gets_what_the_table_says(machine: str, profile: Profile) -> None:
    code = assemble(profile, 77, machine)
    expected = dict.fromkeys(numbers("refused", machine).values(), REFUSE)
    for group in ("files", "memory", "process", "time", "signals", "waiting", "sockets"):
        expected |= dict.fromkeys(numbers(group, machine).values(), ALLOW)
    expected |= dict.fromkeys(numbers("attributes", machine).values(), REFUSE if profile.shared else ALLOW)
    conditional = {*numbers("conditional", machine).values(), *numbers("execution", machine).values()}
    for number in range(1100):
        if number not in conditional:
            assert interpret(code, ARCHITECTURES[machine], number) == expected.get(number, ABSENT), number


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_other_tables_are_closed(machine: str) -> None:
    code = assemble(STRICT, 77, machine)
    assert interpret(code, 0x40000003, 1) == KILL
    for number in (0x40000000, 0x40000001, 0x40000039, 0xFFFFFFFF):
        assert interpret(code, ARCHITECTURES[machine], number) == ABSENT


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize(
    ("profile", "name", "arguments", "verdict"),
    [
        (STRICT, "clone", (0x3D0F00,), ALLOW),
        (STRICT, "clone", (17,), REFUSE),
        (STRICT, "clone", (0x3D0F00 | 0x10000000,), REFUSE),
        (OPEN, "clone", (17,), ALLOW),
        *[(OPEN, "clone", (17 | 1 << bit,), REFUSE) for bit in (17, 25, 26, 27, 28, 29, 30)],
        (STRICT, "execve", (), REFUSE),
        (Profile(True, False, False), "execve", (), ALLOW),
        (Profile(True, False, False), "clone", (17,), REFUSE),
        (STRICT, "socketpair", (1, 1 | 0o2000000, 0), ALLOW),
        (STRICT, "socketpair", (1, 2, 0), REFUSE),
        (STRICT, "socketpair", (2, 1, 0), REFUSE),
        (STRICT, "ioctl", (0, 0x5401), ALLOW),
        (STRICT, "ioctl", (0, 0x5412), REFUSE),
        (STRICT, "prctl", (15,), ALLOW),
        (STRICT, "prctl", (1,), REFUSE),
        (STRICT, "prlimit64", (0,), ALLOW),
        (STRICT, "prlimit64", (1,), REFUSE),
        (STRICT, "kill", (1, 9), ALLOW),
        (SHARED, "kill", (77, 9), ALLOW),
        (SHARED, "kill", (78, 9), REFUSE),
        (SHARED, "kill", (0xFFFFFFFF, 9), REFUSE),
        (SHARED, "tgkill", (77, 77, 9), ALLOW),
        (SHARED, "tgkill", (1, 1, 9), REFUSE),
        (SHARED, "tkill", (77, 9), REFUSE),
        (Profile(True, True, True), "setsid", (), REFUSE),
        (OPEN, "setsid", (), ALLOW),
    ],
)
def test_arguments_decide(machine: str, profile: Profile, name: str, arguments: tuple[int, ...], verdict: int) -> None:
    known = {**numbers("conditional", machine), **numbers("execution", machine)}
    code = assemble(profile, 77, machine)
    assert interpret(code, ARCHITECTURES[machine], known[name], arguments) == verdict


@given(st.lists(st.binary(max_size=3000), max_size=5))
def test_frames_arrive_as_they_were_sent(frames: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for frame in frames:
            send_frame(ours, frame)
        ours.close()
        assert [receive_frame(theirs) for _ in frames] == frames
        assert receive_frame(theirs) is None


@given(st.binary(min_size=1, max_size=64))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        ours.close()
        try:
            while receive_frame(theirs) is not None:
                pass
        except FrameError:
            pass


def test_a_frame_may_not_be_longer_than_the_limit() -> None:
    with pytest.raises(FrameError):
        header((16 << 20) + 1)
