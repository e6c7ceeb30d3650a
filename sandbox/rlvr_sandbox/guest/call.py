"""The guest of the program under test: loads it, then answers requests about it one by one.

A request is ``[operation, subject, arguments...]``. The reply is ``["value", value]``, after a call in place
``["value", value, args]``, or ``["raised", type, message]``. All of it is a claim: whoever asks must not believe more
than that the program said so.
"""

from __future__ import annotations

import operator
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from rlvr_sandbox.guest.codec import CodecError, Opaque, decode, encode, type_name
from rlvr_sandbox.guest.solution import describe, find, load
from rlvr_sandbox.isolation.frames import receive_frame, send_frame


def main(source: str, channel: socket.socket) -> None:
    """Serve requests until ``channel`` ends; the first one is ``["load", tokens]``."""
    server = _Server(source)
    while (frame := receive_frame(channel)) is not None:
        send_frame(channel, server.answer(frame))


class _Server:
    def __init__(self, source: str) -> None:
        self._source = source
        self._module = types.ModuleType("solution")
        self._tokens = False
        self._objects: list[object] = []
        self._numbers: dict[int, int] = {}

    def answer(self, frame: bytes) -> bytes:
        try:
            request = decode(frame, lambda token: self._objects[token.number])
            return encode(["value", *self._serve(request)], self._reduce)
        except BaseException as error:  # noqa: BLE001 - SystemExit of the program is its answer, not our end
            return encode(["raised", *describe(error)])

    def _serve(self, request: Any) -> list[object]:
        operation, subject, *arguments = request
        if operation == "load":
            self._tokens = subject
            self._module = load(self._source)
            return [None]
        if operation == "call":
            args, kwargs, inplace = arguments
            value = self._subject(subject)(*args, **kwargs)
            return [value, args] if inplace else [value]
        return [_OPERATIONS[operation](self._subject(subject), *arguments)]

    def _subject(self, subject: object) -> Any:
        return find(self._module, subject) if isinstance(subject, str) else subject

    def _reduce(self, value: object) -> object:
        """NumPy's arrays and scalars become lists and numbers; other objects stay here and their number crosses."""
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
            return value.tolist()
        if not self._tokens:
            raise CodecError(f"an object of type {type_name(value)} is no plain data")
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return Opaque(self._numbers[id(value)], type_name(value))


def _advance(iterator: Any) -> list[object]:
    """The next item in a list, or an empty list at the end."""
    for item in iterator:
        return [item]
    return []


def _attribute(subject: object, name: str) -> object:
    return getattr(subject, name)


_OPERATIONS: dict[str, Callable[..., object]] = {
    "find": lambda subject: subject,
    "attribute": _attribute,
    "assign": setattr,
    "iterate": iter,
    "advance": _advance,
    "length": len,
    "item": operator.getitem,
    "contains": operator.contains,
    "text": str,
}
