"""The executor: slots that are always there, a lease on one for each run, one retry where a slot broke."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

from rlvr_sandbox.execution import Limits, Outcome, Program
from rlvr_sandbox.isolation.compiling import Compiler
from rlvr_sandbox.isolation.flight import Flight
from rlvr_sandbox.isolation.janitor import Janitor
from rlvr_sandbox.isolation.messages import Order
from rlvr_sandbox.isolation.session import SlotSession, infra_error
from rlvr_sandbox.isolation.slot import Slot, SlotBrokenError
from rlvr_sandbox.languages import LANGUAGES, Language, available
from rlvr_sandbox.verdicts import SandboxError

_WATCH_S = 0.5
_RESPAWN_DELAY_S = 1.0
_SETTLE_S = 3.0
_MAX_FAILURES = 5

logger = logging.getLogger(__name__)


class SlotExecutor:
    """An isolation backend with its warm slots; see ``rlvr_sandbox.execution.Executor``."""

    def __init__(self, name: str, slots: int, spawn: Callable[[int], Awaitable[Slot]], janitor: Janitor) -> None:
        """Configure the executor; ``start`` brings it up.

        Args:
            name: The backend's.
            slots: How many programs run at once. Sessions may take as many again, so that a judgement that holds one
                session always gets a second while no more than ``slots`` judgements are under way.
            spawn: Starts the slot of a number.
            janitor: Tidies up once nothing runs any more.
        """
        self.name = name
        self.slots = slots
        self.languages = available()
        self.report = ""
        self.restarts = 0
        self._spawn = spawn
        self._janitor = janitor
        self._free: asyncio.Queue[Slot] = asyncio.Queue()
        self._keepers: list[asyncio.Task[None]] = []
        self._living: set[Slot] = set()
        self._settling: set[asyncio.Task[None]] = set()
        self._failures = 0
        self._fault = ""
        self._watcher: asyncio.Task[None] | None = None
        self._compiler = Compiler(self._run_order)

    async def start(self) -> None:
        """Bring up every slot.

        Raises:
            SandboxError: If one does not start.
        """
        first = await asyncio.gather(*(self._spawn(number) for number in range(self.slots)), return_exceptions=True)
        up = [slot for slot in first if isinstance(slot, Slot)]
        for error in first:
            if not isinstance(error, Slot):
                await asyncio.gather(*(slot.kill() for slot in up))
                raise error
        self._keepers = [asyncio.create_task(self._keep(number, slot)) for number, slot in enumerate(up)]
        self._watcher = asyncio.create_task(self._watch())

    async def run(self, program: Program, limits: Limits, stdin: bytes = b"") -> Outcome:
        """Run ``program`` once, from its first line to its end.

        Raises:
            SandboxError: If its language is not one of ``languages``.
        """
        language = self._language(program)
        files = {language.file: (program.source.encode(errors="surrogatepass"), 0o644)}
        if language.compile:
            artifact = await self._compiler.artifact(language, program.source)
            if isinstance(artifact, Outcome):
                return artifact
            files = {language.artifact: (artifact, 0o755)}
        files |= {name: (content, 0o644) for name, content in program.files.items()}
        order = _order(files, limits, language, list(language.run))
        return await self._run_order(order, b"".join(content for content, _ in files.values()), limits, stdin)

    @contextlib.asynccontextmanager
    async def open(self, program: Program, limits: Limits, guest: str) -> AsyncIterator[SlotSession]:
        """Start ``rlvr_sandbox.guest.<guest>.main(source, channel)`` (Python only) and talk to it frame by frame.

        Raises:
            SandboxError: If the program is not in Python.
        """
        language = self._language(program)
        if language.run:
            raise SandboxError(f"sessions are for Python programs; run the {program.language} program instead")
        files = {language.file: (program.source.encode(errors="surrogatepass"), 0o644)}
        files |= {name: (content, 0o644) for name, content in program.files.items()}
        order = _order(files, limits, language, [], guest)
        async with self._lease(extra=True) as slot:
            flight = Flight(slot, order, limits, language.memory_marks)
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            with ours:
                with theirs:
                    flight.launch(b"".join(content for content, _ in files.values()), b"", theirs.fileno())
                try:
                    yield SlotSession(flight, ours)
                finally:
                    flight.kill("abandoned")
                    flight.discard()

    async def close(self) -> None:
        """Kill everything that still runs."""
        tasks = [*self._keepers, *([self._watcher] if self._watcher else []), *self._settling]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(slot.kill() for slot in self._living))
        self._living.clear()
        await asyncio.to_thread(self._janitor.close)

    def _language(self, program: Program) -> Language:
        if program.language not in self.languages:
            known = LANGUAGES.get(program.language)
            mend = f"install {known.tool}" if known else f"use one of {', '.join(self.languages)}"
            raise SandboxError(f"language {program.language!r} is not available here; {mend}")
        return LANGUAGES[program.language]

    async def _run_order(self, order: Order, payload: bytes, limits: Limits, stdin: bytes = b"") -> Outcome:
        """Run ``order`` in a free slot, once more where the first one broke."""
        reason = ""
        marks = next((known.memory_marks for known in LANGUAGES.values() if list(known.run) == order.argv), ())
        for _ in range(2):
            try:
                async with self._lease() as slot:
                    flight = Flight(slot, order, limits, marks)
                    try:
                        flight.launch(payload, stdin)
                        flight.resume()
                        return await flight.land()
                    finally:
                        flight.kill("abandoned")
                        flight.discard()
            except SlotBrokenError as error:
                reason = str(error)
                logger.warning("a sandbox slot broke during a run: %s", reason)
        return infra_error(f"two sandbox slots broke under it: {reason}")

    @contextlib.asynccontextmanager
    async def _lease(self, extra: bool = False) -> AsyncIterator[Slot]:
        """A free slot for as long as the body lasts; ``extra`` may add slots up to twice the number."""
        if extra and self._free.empty() and len(self._keepers) < 2 * self.slots:
            number = len(self._keepers)
            self._keepers.append(asyncio.create_task(self._keep(number, None)))
        slot = await self._next_free()
        try:
            yield slot
        finally:
            if slot.busy and not slot.ended.is_set():
                task = asyncio.create_task(self._settle(slot))
                self._settling.add(task)
                task.add_done_callback(self._settling.discard)
            else:
                self._give_back(slot)

    async def _next_free(self) -> Slot:
        while True:
            if self._fault:
                raise SlotBrokenError(self._fault)
            slot = await self._free.get()
            if not slot.ended.is_set():
                return slot

    async def _settle(self, slot: Slot) -> None:
        """Wait for a killed run's report before the slot serves again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                await slot.idle()
        if slot.busy:
            slot.fail("its zygote does not obey")
        self._give_back(slot)

    def _give_back(self, slot: Slot) -> None:
        if slot.worn:
            slot.fail("it has served its time")
        if not slot.ended.is_set():
            self._free.put_nowait(slot)

    async def _keep(self, number: int, slot: Slot | None) -> None:
        """See to it that the slot of this number exists."""
        while True:
            if slot is None:
                slot = await self._respawn(number)
                continue
            self._living.add(slot)
            self._free.put_nowait(slot)
            await slot.ended.wait()
            await slot.kill()
            self._living.discard(slot)
            self.restarts += 1
            slot = None

    async def _respawn(self, number: int) -> Slot | None:
        try:
            slot = await self._spawn(number)
        except SandboxError as error:
            logger.error("%s", error)
            self._failures += 1
            self._fault = str(error) if self._failures >= _MAX_FAILURES else ""
            await asyncio.sleep(_RESPAWN_DELAY_S)
            return None
        self._failures, self._fault = 0, ""
        return slot

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            for slot in list(self._living):
                slot.check()
            self._janitor.check()


def _order(
    files: dict[str, tuple[bytes, int]], limits: Limits, language: Language, argv: list[str], guest: str = ""
) -> Order:
    size = sum(len(content) for content, _ in files.values())
    return Order(
        files=[(name, len(content), mode) for name, (content, mode) in files.items()],
        argv=argv,
        guest=guest,
        env=dict(language.env),
        cpu_s=limits.cpu_s,
        memory_bytes=limits.memory_bytes,
        disk_bytes=limits.disk_bytes + size,
        processes=max(limits.processes, language.processes),
        address_space=language.address_space,
    )
