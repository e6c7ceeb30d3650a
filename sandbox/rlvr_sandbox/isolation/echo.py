"""The simplest guest: answers every frame with itself. The self-test talks to it."""

from __future__ import annotations

import socket

from rlvr_sandbox.isolation.frames import receive_frame, send_frame


def main(source: str, channel: socket.socket) -> None:
    """Run ``source`` once, then echo until the channel ends."""
    exec(compile(source, "main.py", "exec"), {"__name__": "candidate"})
    while (frame := receive_frame(channel)) is not None:
        send_frame(channel, frame)
