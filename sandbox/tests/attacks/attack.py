"""What an attack is: a small harmless program and how it must be contained."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlvr_sandbox.execution import Ending, Limits

HELD = (Ending.EXITED,)
TIME = (Ending.TIME_LIMIT,)
MEMORY = (Ending.MEMORY_LIMIT,)
OUTPUT = (Ending.OUTPUT_LIMIT,)
KILLED = (Ending.SIGNALLED,)
NORMAL = Limits(cpu_s=4.0, wall_s=8.0, memory_bytes=256 << 20)
SHORT = Limits(cpu_s=0.15, wall_s=0.6, memory_bytes=128 << 20)
SEVERAL = Limits(cpu_s=1.0, wall_s=1.2, memory_bytes=256 << 20, processes=12)

CALLS = """
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"
def raw(x86, arm, *arguments):
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(arm if ARM else x86), *words)
    return (result, "returned") if result >= 0 else False
"""


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        name: What it tries.
        source: The program; in Python it follows the bait's preamble, where ``attempt`` prints ``held`` on failure.
        endings: How it may end. A program that exits must also print ``held`` and nothing else.
        limits: Its limits.
        language: Its language.
        then: A second program that is run right after it and must print ``held``.
    """

    name: str
    source: str
    endings: tuple[Ending, ...] = HELD
    limits: Limits = field(default=NORMAL)
    language: str = "python"
    then: str = ""


def call(name: str, body: str, **options: object) -> Attack:
    """An attack by raw system calls."""
    return Attack(name, CALLS + body, **options)  # type: ignore[arg-type]
