"""A session: frames to and from a guest that stays."""

from __future__ import annotations

import asyncio
import socket

from rlvr_sandbox.execution import Ending, Outcome
from rlvr_sandbox.isolation.flight import Flight
from rlvr_sandbox.isolation.frames import HEADER_BYTES, MAX_FRAME, header
from rlvr_sandbox.isolation.slot import SlotBrokenError

_PART = 1 << 20


class SlotSession:
    """The service's side of one guest; see ``rlvr_sandbox.execution.Session``."""

    def __init__(self, flight: Flight, channel: socket.socket) -> None:
        self._flight = flight
        self._channel = channel
        self._broken = False
        self._outcome: Outcome | None = None

    async def call(self, frame: bytes) -> bytes | None:
        """Send one frame and wait for the answer; ``None`` once the program has ended or broken the framing.

        Raises:
            FrameError: If ``frame`` itself is too long.
        """
        head = header(len(frame))
        if self._broken:
            return None
        loop = asyncio.get_running_loop()
        self._flight.resume()
        answered = False
        try:
            await loop.sock_sendall(self._channel, head + frame)
            answer = await self._receive()
            answered = answer is not None
        except OSError:  # The guest closed its end; why, the outcome tells.
            answer = None
        finally:
            self._flight.pause()
            self._broken = not answered
        return answer

    async def _receive(self) -> bytes | None:
        head = await self._read(HEADER_BYTES)
        if head is None:
            return None
        size = int.from_bytes(head, "big")
        return await self._read(size) if size <= MAX_FRAME else None

    async def _read(self, size: int) -> bytes | None:
        loop = asyncio.get_running_loop()
        parts = bytearray()
        while len(parts) < size:
            part = await loop.sock_recv(self._channel, min(size - len(parts), _PART))
            if not part:
                return None
            parts += part
        return bytes(parts)

    async def finish(self) -> Outcome:
        """Close the channel, let the program end within its limits, and say what came of it."""
        if self._outcome is None:
            self._broken = True
            self._channel.close()
            self._flight.resume()
            try:
                self._outcome = await self._flight.land()
            except SlotBrokenError as error:
                self._outcome = infra_error(str(error))
        return self._outcome


def infra_error(detail: str) -> Outcome:
    """The outcome of a run that the service failed to carry out."""
    return Outcome(Ending.INFRA_ERROR, None, None, b"", b"", 0.0, 0.0, detail)
