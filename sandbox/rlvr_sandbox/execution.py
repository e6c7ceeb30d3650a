"""The nouns of running programs that nobody trusts: what to run, within which limits, and what came of it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol


class Ending(enum.StrEnum):
    """How a run ended. What the program printed or returned is a claim; this is what the supervisor saw."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    TIME_LIMIT = "time_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    COMPILE_ERROR = "compile_error"
    INFRA_ERROR = "infra_error"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may take.

    Attributes:
        cpu_s: CPU seconds of all its processes together; the only clock that a verdict depends on.
        wall_s: Wall seconds after which it is considered hung; ``None`` is ``3 * cpu_s + 2``.
        memory_bytes: Memory of all its processes together.
        output_bytes: Bytes it may print, stdout and stderr counted apart.
        disk_bytes: Bytes it may write into its private directory.
        processes: Processes and threads it may have at once; 1 forbids ``fork`` and ``exec`` but not threads.
    """

    cpu_s: float = 5.0
    wall_s: float | None = None
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    disk_bytes: int = 16 << 20
    processes: int = 1


@dataclass(frozen=True, slots=True)
class Program:
    """Source text in one of the languages that the executor lists; ``files`` lie beside it when it runs."""

    language: str
    source: str
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the supervisor saw of one run.

    Attributes:
        ending: How it ended.
        exit_status: Its exit status where it exited, else ``None``.
        signal: The signal that killed it where one did, else ``None``.
        stdout: What it printed, at most ``Limits.output_bytes``.
        stderr: The same for its errors; the compiler's messages after ``COMPILE_ERROR``.
        cpu_s: CPU seconds used.
        wall_s: Wall seconds used.
        detail: For a human: why, where the other attributes do not say it.
    """

    ending: Ending
    exit_status: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    cpu_s: float
    wall_s: float
    detail: str = ""


class Session(Protocol):
    """A program that stays and answers frames: one of the ``rlvr_sandbox.guest`` modules, holding the source.

    On the stream socket between them a frame looks as ``rlvr_sandbox.isolation.frames`` lays down.
    """

    async def call(self, frame: bytes) -> bytes | None:
        """Send one frame and wait for the answer; ``None`` once the program has ended or broken the framing."""
        ...

    async def finish(self) -> Outcome:
        """Close the channel, let the program end within its limits, and say what came of it."""
        ...


class Executor(Protocol):
    """An isolation backend with its warm slots.

    Attributes:
        name: ``ns``, ``landlock``, ``bwrap`` or ``none``; verdicts carry it.
        languages: The languages that programs may be in.
    """

    name: str
    languages: tuple[str, ...]

    async def run(self, program: Program, limits: Limits, stdin: bytes = b"") -> Outcome:
        """Run ``program`` once, from its first line to its end."""
        ...

    def open(self, program: Program, limits: Limits, guest: str) -> AbstractAsyncContextManager[Session]:
        """Start ``rlvr_sandbox.guest.<guest>.main(source, channel)`` (Python only) and talk to it frame by frame."""
        ...

    async def close(self) -> None:
        """Kill everything that still runs."""
        ...
