"""The connection of one generation, which another thread can cut."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from typing import Any

_CONNECTED = ("connection.connect_tcp.complete", "connection.start_tls.complete")


class Wire:
    """Ends a request that waits for its reply: closing a client does not wake the thread that reads from it."""

    def __init__(self) -> None:
        """Prepare; there is no connection yet."""
        self._socket: socket.socket | None = None
        self._is_cut = False

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Note the connection; the ``trace`` extension of a request, which httpx calls with all that happens to it."""
        if event in _CONNECTED:
            self._socket = info["return_value"].get_extra_info("socket")
            if self._is_cut:
                self.cut()

    def cut(self) -> None:
        """Hang up, now or as soon as there is a connection; the request then fails as one without a reply."""
        self._is_cut = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)
