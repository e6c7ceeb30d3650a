"""The frames of a session's channel: four bytes of length, most significant first, and that many bytes."""

from __future__ import annotations

import socket

MAX_FRAME = 16 << 20
HEADER_BYTES = 4


class FrameError(Exception):
    """The other side broke the framing: a frame that is too long, or one that is cut off."""


def header(size: int) -> bytes:
    """The header of a frame of ``size`` bytes.

    Raises:
        FrameError: If the frame would be longer than ``MAX_FRAME``.
    """
    if size > MAX_FRAME:
        raise FrameError(f"a frame of {size} bytes is longer than {MAX_FRAME}")
    return size.to_bytes(HEADER_BYTES, "big")


def send_frame(channel: socket.socket, frame: bytes) -> None:
    """Write one frame to a blocking channel."""
    channel.sendall(header(len(frame)) + frame)


def receive_frame(channel: socket.socket) -> bytes | None:
    """Read one frame from a blocking channel; ``None`` where the other side has closed it between frames."""
    head = _read(channel, HEADER_BYTES)
    if head is None:
        return None
    size = int.from_bytes(head, "big")
    if size > MAX_FRAME:
        raise FrameError(f"a frame of {size} bytes is longer than {MAX_FRAME}")
    body = _read(channel, size)
    if body is None:
        raise FrameError("the channel ended inside a frame")
    return body


def _read(channel: socket.socket, size: int) -> bytes | None:
    """Exactly ``size`` bytes; ``None`` at the end of the channel."""
    parts = bytearray()
    while len(parts) < size:
        part = channel.recv(min(size - len(parts), 1 << 20))
        if not part:
            if parts:
                raise FrameError("the channel ended inside a frame")
            return None
        parts += part
    return bytes(parts)
