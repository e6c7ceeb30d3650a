"""What the tests see of the program under test: objects that ask the other sandbox, and plain data that came back.

Results are plain data, which cannot change its mind between two looks; only where the tests ask for ``objects`` may
other objects stay over there and answer each time they are asked. Even then they have no say in a comparison: they are
never equal, never true and never ordered. Exceptions of the program come back as the builtin of that name, unless that
could end a loop or this process.
"""

from __future__ import annotations

import builtins
import socket
from collections.abc import Iterator
from typing import Any, Never

from rlvr_sandbox.guest.codec import CodecError, Opaque, decode, encode
from rlvr_sandbox.isolation.frames import receive_frame, send_frame

REQUEST = b"R"
MAX_REQUESTS = 200_000


class ProgramError(Exception):
    """The program under test raised something that has no builtin name here."""


# No error of the program: tests must not be able to catch it as one.
class BrokenTests(BaseException):
    """The tests ask for what cannot cross, or the judge went away."""


class Remote:
    """The other end of ``channel``, by way of the judge, who passes requests and answers on.

    Attributes:
        requests: How many requests were answered.
        fault: What the tests asked for that cannot be; a test framework may have caught the exception.
    """

    def __init__(self, channel: socket.socket, inplace: bool, objects: bool) -> None:
        self.requests = 0
        self.fault = ""
        self._objects = objects
        self._channel = channel
        self._inplace = inplace
        self._handles: dict[int, Handle] = {}

    def ask(self, operation: str, subject: object, *arguments: object) -> Any:
        """The value that the program answers with; raises what it raised."""
        reply = self._exchange([operation, subject, *arguments])
        return reply[0]

    def call(self, subject: object, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        """Call a function over there; with ``inplace`` its changes to list, dict and set arguments are made here."""
        value, *changed = self._exchange(["call", subject, list(args), kwargs, self._inplace])
        if changed:
            for before, after in zip(args, changed[0], strict=True):
                _copy_back(before, after)
        return value

    def _exchange(self, request: list[object]) -> list[Any]:
        if self.requests >= MAX_REQUESTS:
            raise self._broken(f"the tests ask more than {MAX_REQUESTS} times; split them")
        try:
            frame = encode(request, _token)
        except CodecError as error:
            fault = f"an argument does not cross to the program ({error}); use mode 'inproc'"
            raise self._broken(fault) from error
        send_frame(self._channel, REQUEST + frame)
        answer = receive_frame(self._channel)
        if answer is None:
            raise self._broken("the judge went away")
        self.requests += 1
        return self._open(answer, objects=self._objects or request[0] == "find")

    def _broken(self, fault: str) -> BrokenTests:
        self.fault = fault
        return BrokenTests(fault)

    def _open(self, answer: bytes, objects: bool) -> list[Any]:
        try:
            reply = decode(answer, self._handle if objects else None)
        except CodecError as error:
            raise ProgramError(f"the program's answer is no plain data ({error})") from error
        match reply:
            case ["value", *rest] if 1 <= len(rest) <= 2:
                return rest
            case ["raised", str(name), str(message)]:
                raise _exception(name, message)
        raise ProgramError("the program's answer has no known form")

    def _handle(self, token: Opaque) -> Handle:
        return self._handles.setdefault(token.number, Handle(self, token))


class Handle:
    """An object of the program that stays where it is."""

    __slots__ = ("_remote", "_token")

    def __init__(self, remote: Remote, token: Opaque) -> None:
        self._remote = remote
        self._token = token

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """What the program answers."""
        return self._remote.call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._remote.ask("attribute", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in Handle.__slots__:
            object.__setattr__(self, name, value)
        else:
            self._remote.ask("assign", self, name, value)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._remote.ask("iterate", self)
        if not isinstance(iterator, Handle):
            raise TypeError("the program's object is not iterable")
        while batch := _batch(self._remote.ask("advance", iterator)):
            yield batch[0]

    def __next__(self) -> Any:
        batch = _batch(self._remote.ask("advance", self))
        if not batch:
            raise StopIteration
        return batch[0]

    def __len__(self) -> int:
        return int(self._remote.ask("length", self))

    def __getitem__(self, key: object) -> Any:
        return self._remote.ask("item", self, key)

    def __contains__(self, item: object) -> bool:
        return self._remote.ask("contains", self, item) is True

    def __str__(self) -> str:
        text = self._remote.ask("text", self)
        return text if isinstance(text, str) else ""

    def __repr__(self) -> str:
        return f"<{self._token.type_name} of the program>"

    def __bool__(self) -> bool:
        self._refuse()

    def __eq__(self, other: object) -> bool:
        self._refuse()

    def __ne__(self, other: object) -> bool:
        self._refuse()

    __hash__ = object.__hash__

    def _refuse(self) -> Never:
        raise TypeError(f"{self!r} stays in its sandbox, so its word on being equal or true counts for nothing")


def _token(value: object) -> object:
    return value._token if type(value) is Handle else value


def _batch(reply: object) -> list[Any]:
    return reply if isinstance(reply, list) else []


def _copy_back(before: object, after: object) -> None:
    if type(before) is not type(after):
        return
    if isinstance(before, list) and isinstance(after, list):
        before[:] = after
    elif isinstance(before, dict | set) and isinstance(after, dict | set):
        before.clear()
        before.update(after)


def _exception(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    # StopIteration would end a loop over map(candidate, ...) as if every case had been seen.
    if not isinstance(kind, type) or not issubclass(kind, Exception) or issubclass(kind, _ENDS_LOOPS):
        return ProgramError(f"{name}: {message}")
    try:
        return kind(message)
    except TypeError:
        return ProgramError(f"{name}: {message}")


_ENDS_LOOPS = (StopIteration, StopAsyncIteration)
