"""Compiling programs: in a sandbox of its own, once for the same text, flags and compiler."""

from __future__ import annotations

import asyncio
import hashlib
import shlex
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from rlvr_sandbox.execution import Ending, Limits, Outcome
from rlvr_sandbox.isolation.messages import Order
from rlvr_sandbox.languages import Language, toolchain

CACHE_BYTES = 256 << 20
COMPILE_LIMITS = Limits(cpu_s=30.0, memory_bytes=1 << 30, output_bytes=64 << 20, disk_bytes=128 << 20, processes=32)

RunOrder = Callable[[Order, bytes, Limits], Awaitable[Outcome]]


class Compiler:
    """Artifacts by hash of what they were made from, the longest unused ones forgotten first."""

    def __init__(self, run_order: RunOrder) -> None:
        self._run_order = run_order
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._pending: dict[str, asyncio.Task[bytes | Outcome]] = {}

    async def artifact(self, language: Language, source: str) -> bytes | Outcome:
        """The compiled program, or how compiling ended where it failed."""
        text = source.encode(errors="surrogatepass")
        recipe = "\0".join((language.name, toolchain(language), *language.compile)).encode()
        key = hashlib.sha256(recipe + b"\0" + text).hexdigest()
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        task = self._pending.get(key)
        if task is None:
            task = asyncio.create_task(self._compile(key, language, text))
            self._pending[key] = task
            task.add_done_callback(lambda _: self._pending.pop(key, None))
        return await asyncio.shield(task)

    async def _compile(self, key: str, language: Language, text: bytes) -> bytes | Outcome:
        command = f"{shlex.join(language.compile)} 1>&2 && cat {language.artifact}"
        order = Order(
            files=[(language.file, len(text), 0o644)],
            argv=["/bin/sh", "-c", command],
            guest="",
            env={},
            cpu_s=COMPILE_LIMITS.cpu_s,
            memory_bytes=COMPILE_LIMITS.memory_bytes,
            disk_bytes=COMPILE_LIMITS.disk_bytes,
            processes=COMPILE_LIMITS.processes,
            address_space=True,
        )
        outcome = await self._run_order(order, text, COMPILE_LIMITS)
        if outcome.ending is Ending.EXITED and outcome.exit_status == 0:
            self._remember(key, outcome.stdout)
            return outcome.stdout
        return _failure(outcome)

    def _remember(self, key: str, artifact: bytes) -> None:
        self._cache[key] = artifact
        self._bytes += len(artifact)
        while self._bytes > CACHE_BYTES:
            _, oldest = self._cache.popitem(last=False)
            self._bytes -= len(oldest)


def _failure(outcome: Outcome) -> Outcome:
    """A failed compilation as the outcome of the run that never was."""
    if outcome.ending is Ending.INFRA_ERROR:
        return outcome
    detail = outcome.detail or "the compiler refused the program"
    return Outcome(
        Ending.COMPILE_ERROR,
        outcome.exit_status,
        outcome.signal,
        b"",
        outcome.stderr,
        outcome.cpu_s,
        outcome.wall_s,
        detail,
    )
