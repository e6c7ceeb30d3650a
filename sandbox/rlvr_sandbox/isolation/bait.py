"""Things on the service's side of the walls that attacks try to reach, and whether one did."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import tempfile
from types import TracebackType

_PREAMBLE = """\
import os, sys, json
BAIT = json.loads({facts!r})
def attempt(*tries):
    for action in tries:
        try:
            result = action()
        except (OSError, MemoryError, RuntimeError, ValueError, AttributeError, ImportError):
            continue
        if result is not False:
            print("escaped", repr(result)[:200], flush=True)
            os._exit(0)
    print("held")
"""


class Bait:
    """A secret file, an open directory, and listeners on TCP and on unix sockets, for as long as the context lasts."""

    def __init__(self, place: str | None = None) -> None:
        """Choose where it will lie: in ``place``, or where temporary files do."""
        self._place = place
        self._stack = contextlib.ExitStack()
        self._listeners: list[socket.socket] = []

    def __enter__(self) -> Bait:
        """Lay it out."""
        self.directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bait-", dir=self._place))
        os.chmod(self.directory, 0o777)
        self.secret = secrets.token_hex(8)
        self.file = os.path.join(self.directory, "secret.txt")
        with open(self.file, "w") as file:
            file.write(self.secret)
        os.chmod(self.file, 0o666)
        path, abstract = os.path.join(self.directory, "socket"), f"\0rlvr-{self.secret}"
        tcp = self._listen(socket.AF_INET, ("127.0.0.1", 0))
        self._listen(socket.AF_UNIX, path)
        self._listen(socket.AF_UNIX, abstract)
        os.chmod(path, 0o777)
        self.facts = {
            "directory": self.directory,
            "file": self.file,
            "secret_length": len(self.secret),
            "port": tcp.getsockname()[1],
            "unix": path,
            "abstract": abstract[1:],
            "service": os.getpid(),
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take it away."""
        self._stack.close()

    def _listen(self, family: int, address: object) -> socket.socket:
        listener = self._stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.bind(address)  # type: ignore[arg-type]
        listener.listen(8)
        listener.setblocking(False)
        self._listeners.append(listener)
        return listener

    def program(self, body: str) -> str:
        """``body`` with the facts as ``BAIT`` and ``attempt``, which prints ``held`` if none of the tries works."""
        return _PREAMBLE.format(facts=json.dumps(self.facts)) + body

    def taken(self) -> str:
        """What a program managed to do, seen from here; empty if nothing."""
        for listener in self._listeners:
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                continue
            return "connect to a socket of the service"
        if os.stat(self.file).st_mode & 0o777 != 0o666 or os.stat(self.file).st_size != len(self.secret):
            return "change a file outside"
        if sorted(os.listdir(self.directory)) != ["secret.txt", "socket"]:
            return "leave a file outside"
        return ""
