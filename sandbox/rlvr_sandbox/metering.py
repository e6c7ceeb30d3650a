"""An executor that counts what passes through another one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from rlvr_sandbox.execution import Executor, Limits, Outcome, Program, Session
from rlvr_sandbox.metrics import Metrics


class _MeteredSession:
    """A session whose outcome is counted once it has finished."""

    def __init__(self, session: Session, language: str, metrics: Metrics) -> None:
        self._session = session
        self._language = language
        self._metrics = metrics

    async def call(self, frame: bytes) -> bytes | None:
        """Pass one frame on."""
        return await self._session.call(frame)

    async def finish(self) -> Outcome:
        """Finish and count."""
        outcome = await self._session.finish()
        self._metrics.ran(self._language, outcome)
        return outcome


class MeteredExecutor:
    """``executor``, with every run of it counted in ``metrics``."""

    def __init__(self, executor: Executor, metrics: Metrics) -> None:
        """Wrap ``executor``, which stays the caller's to close."""
        self._executor = executor
        self._metrics = metrics
        self.name = executor.name
        self.languages = executor.languages

    async def run(self, program: Program, limits: Limits, stdin: bytes = b"") -> Outcome:
        """Run and count."""
        outcome = await self._executor.run(program, limits, stdin)
        self._metrics.ran(program.language, outcome)
        return outcome

    def open(self, program: Program, limits: Limits, guest: str) -> AbstractAsyncContextManager[Session]:
        """Open a session whose outcome will be counted."""

        @asynccontextmanager
        async def opened() -> AsyncIterator[Session]:
            async with self._executor.open(program, limits, guest) as session:
                yield _MeteredSession(session, program.language, self._metrics)

        return opened()

    async def close(self) -> None:
        """Close the executor."""
        await self._executor.close()
