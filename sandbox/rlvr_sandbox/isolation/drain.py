"""The service's ends of a run's pipes: read as they fill, counted, cut at a limit."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

_CHUNK = 1 << 16


class Drain:
    """Collects what comes through one pipe, at most ``limit`` bytes."""

    def __init__(self, limit: int, overflow: Callable[[], None]) -> None:
        """Open the pipe.

        Args:
            limit: Bytes to keep.
            overflow: Called once when more arrives.
        """
        self.data = bytearray()
        self._limit = limit
        self._overflow = overflow
        self._over = False
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        asyncio.get_running_loop().add_reader(self._reader, self._read)

    def release_writer(self) -> None:
        """Close our copy of the writing end, once the run has its own."""
        os.close(self.writer)
        self.writer = -1

    def close(self) -> bytes:
        """Take what is left in the pipe and close it; every writer is dead."""
        while self._reader >= 0 and self._read():
            pass
        self._shut()
        if self.writer >= 0:
            self.release_writer()
        return bytes(self.data)

    def _shut(self) -> None:
        if self._reader >= 0:
            asyncio.get_running_loop().remove_reader(self._reader)
            os.close(self._reader)
            self._reader = -1

    def _read(self) -> bool:
        """Take one chunk; whether there may be more."""
        try:
            chunk = os.read(self._reader, _CHUNK)
        except BlockingIOError:
            return False
        if not chunk:
            self._shut()
            return False
        room = self._limit - len(self.data)
        self.data += chunk[:room]
        if len(chunk) > room and not self._over:
            self._over = True
            self._overflow()
        return True
