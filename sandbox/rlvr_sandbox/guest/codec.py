"""The data-only codec: plain Python data as bytes and back, and nothing that could carry behaviour.

Only the exact types None, bool, int, float, complex, str, bytes, list, tuple, dict, set and frozenset cross. Instances
of their subclasses are flattened to the plain value by the base type's own methods, so an overridden ``__eq__`` or
``__iter__`` is left behind. Everything else is refused, or sent as an ``Opaque`` token where the caller allows tokens.
Decoding builds exact builtins, is bounded in depth, nodes and bytes, and refuses sets and dicts whose keys collide so
often that comparing them would take quadratic time.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 60
MAX_NODES = 200_000
MAX_BYTES = (16 << 20) - 1_024
MAX_COLLISION_COST = 4_000_000

_LENGTH = struct.Struct(">I")
_FLOAT = struct.Struct(">d")
_COMPLEX = struct.Struct(">dd")


class CodecError(ValueError):
    """A value that does not cross, or bytes that are no value."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """Stands for an object that stays on the other side: its number there and the name of its type."""

    number: int
    type_name: str


Reducer = Callable[[object], object]


def encode(value: object, reduce: Reducer | None = None) -> bytes:
    """``value`` as bytes.

    Args:
        value: Plain data.
        reduce: Called with every object that is no plain data; the data or ``Opaque`` that it returns crosses instead.

    Raises:
        CodecError: If something in ``value`` is no plain data, or ``value`` is too deep, too wide or too long.
    """
    writer = _Writer(reduce)
    writer.write(value, 0)
    return bytes(writer.data)


def decode(data: bytes, resolve: Callable[[Opaque], object] | None = None) -> object:
    """The value that ``data`` holds; exact builtins only.

    Args:
        data: Bytes from anywhere.
        resolve: What to put in the place of a token; without it a token is an error.

    Raises:
        CodecError: If ``data`` is not exactly one value within the bounds.
    """
    if len(data) > MAX_BYTES:
        raise CodecError(f"{len(data)} bytes are more than {MAX_BYTES}")
    reader = _Reader(data, resolve)
    try:
        value = reader.read(0)
    except (struct.error, IndexError, UnicodeDecodeError, TypeError) as error:
        raise CodecError(f"not a value: {type(error).__name__} at byte {reader.position}") from error
    if reader.position != len(data):
        raise CodecError(f"{len(data) - reader.position} bytes are left over")
    return value


def plain(value: object) -> object:
    """The value itself where its type is exact, the base type's value of a subclass, any other object unchanged."""
    if type(value) in _WRITERS:
        return value
    for base, flatten in _FLATTEN:
        if issubclass(type(value), base):
            return flatten(value)
    return value


class _Writer:
    def __init__(self, reduce: Reducer | None) -> None:
        self.data = bytearray()
        self._reduce = reduce
        self._nodes = 0

    def write(self, value: object, depth: int) -> None:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise CodecError(f"the value is deeper than {MAX_DEPTH} or has more than {MAX_NODES} parts")
        value = plain(value)
        if type(value) not in _WRITERS and self._reduce is not None:
            value = self._reduce(value)
        write = _WRITERS.get(type(value))
        if write is None:
            raise CodecError(f"an object of type {type_name(value)} is no plain data")
        write(self, value, depth)
        if len(self.data) > MAX_BYTES:
            raise CodecError(f"the value takes more than {MAX_BYTES} bytes")

    def block(self, raw: bytes) -> None:
        self.data += _LENGTH.pack(len(raw))
        self.data += raw

    def items(self, tag: bytes, parts: Iterable[object], count: int, depth: int) -> None:
        self.data += tag + _LENGTH.pack(count)
        for part in parts:
            self.write(part, depth + 1)


def _write_none(writer: _Writer, value: Any, depth: int) -> None:
    writer.data += b"n"


def _write_bool(writer: _Writer, value: Any, depth: int) -> None:
    writer.data += b"t" if value is True else b"f"


def _write_int(writer: _Writer, value: Any, depth: int) -> None:
    if value.bit_length() > 8 * MAX_BYTES - 64:
        raise CodecError(f"an integer of {value.bit_length()} bits is too long")
    writer.data += b"i"
    writer.block(value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _write_float(writer: _Writer, value: Any, depth: int) -> None:
    writer.data += b"d" + _FLOAT.pack(value)


def _write_complex(writer: _Writer, value: Any, depth: int) -> None:
    writer.data += b"c" + _COMPLEX.pack(value.real, value.imag)


def _write_str(writer: _Writer, value: Any, depth: int) -> None:
    writer.data += b"s"
    writer.block(value.encode("utf-8", "surrogatepass"))


def _write_bytes(writer: _Writer, value: Any, depth: int) -> None:
    writer.data += b"b"
    writer.block(value)


def _write_opaque(writer: _Writer, value: Any, depth: int) -> None:
    writer.data += b"o" + _LENGTH.pack(value.number)
    writer.block(value.type_name.encode("utf-8", "surrogatepass"))


def _write_items(writer: _Writer, value: Any, depth: int) -> None:
    parts = list(value)
    writer.items(_CONTAINERS[type(value)], parts, len(parts), depth)


def _write_dict(writer: _Writer, value: Any, depth: int) -> None:
    pairs = [part for pair in list(value.items()) for part in pair]
    writer.items(b"D", pairs, len(pairs) // 2, depth)


_CONTAINERS: dict[type, bytes] = {list: b"L", tuple: b"T", set: b"S", frozenset: b"F"}
_WRITERS: dict[type, Callable[[_Writer, Any, int], None]] = {
    type(None): _write_none,
    bool: _write_bool,
    int: _write_int,
    float: _write_float,
    complex: _write_complex,
    str: _write_str,
    bytes: _write_bytes,
    dict: _write_dict,
    Opaque: _write_opaque,
    **dict.fromkeys(_CONTAINERS, _write_items),
}
# The base type's own methods, called on the instance, so that nothing a subclass overrides is asked.
_FLATTEN: tuple[tuple[type, Callable[..., object]], ...] = (
    (int, int.__int__),
    (float, float.__pos__),
    (complex, complex.__pos__),
    (str, str.__str__),
    (bytes, bytes.__bytes__),
    (list, list.copy),
    (tuple, lambda value: tuple(tuple.__iter__(value))),
    (dict, dict.copy),
    (set, lambda value: set(set.__iter__(value))),
    (frozenset, lambda value: frozenset(frozenset.__iter__(value))),
)


def type_name(value: object) -> str:
    """The name of the value's type, cut to 60 characters."""
    return str(type(value).__name__)[:60]


class _Reader:
    def __init__(self, data: bytes, resolve: Callable[[Opaque], object] | None) -> None:
        self.position = 0
        self._data = data
        self._resolve = resolve
        self._nodes = 0

    def read(self, depth: int) -> object:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise CodecError(f"the value is deeper than {MAX_DEPTH} or has more than {MAX_NODES} parts")
        tag = self._data[self.position]
        self.position += 1
        if tag in _ATOMS:
            return _ATOMS[tag]
        if tag in _BLOCKS:
            return _BLOCKS[tag](self._block())
        if tag in _FIXED:
            return self._fixed(_FIXED[tag])
        if tag == ord("o"):
            return self._opaque()
        if tag in _BUILD:
            return self._container(tag, depth)
        raise CodecError(f"no value starts with the byte {tag}")

    def _fixed(self, layout: struct.Struct) -> object:
        parts = layout.unpack_from(self._data, self.position)
        self.position += layout.size
        return parts[0] if len(parts) == 1 else complex(*parts)

    def _length(self) -> int:
        length: int = _LENGTH.unpack_from(self._data, self.position)[0]
        self.position += _LENGTH.size
        if length > len(self._data) - self.position:
            raise CodecError(f"{length} parts are announced and {len(self._data) - self.position} bytes are left")
        return length

    def _block(self) -> bytes:
        length = self._length()
        self.position += length
        return self._data[self.position - length : self.position]

    def _opaque(self) -> object:
        number: int = _LENGTH.unpack_from(self._data, self.position)[0]
        self.position += _LENGTH.size
        token = Opaque(number, _text(self._block()))
        if self._resolve is None:
            raise CodecError(f"an object of type {token.type_name[:60]} is no plain data")
        return self._resolve(token)

    def _container(self, tag: int, depth: int) -> object:
        count = self._length()
        if tag == ord("D"):
            pairs = [(self.read(depth + 1), self.read(depth + 1)) for _ in range(count)]
            _check_keys([key for key, _ in pairs])
            mapping = dict(pairs)
            return self._counted(mapping, len(mapping), count)
        parts = [self.read(depth + 1) for _ in range(count)]
        if tag in (ord("S"), ord("F")):
            _check_keys(parts)
            members = set(parts)
            return self._counted(_BUILD[tag](members), len(members), count)
        return _BUILD[tag](parts)

    def _counted(self, value: object, distinct: int, announced: int) -> object:
        if distinct != announced:
            raise CodecError("a set or dict holds the same key twice")
        return value


def _check_keys(keys: list[object]) -> None:
    """Integers, floats and tuples of them can be made to share one hash, which makes building a dict quadratic."""
    cost = sum(count * count for count in Counter(map(hash, keys)).values())
    if cost > MAX_COLLISION_COST:
        raise CodecError("the keys of a set or dict share too few hashes")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


_ATOMS: dict[int, object] = {ord("n"): None, ord("t"): True, ord("f"): False}
_BLOCKS: dict[int, Callable[[bytes], object]] = {
    ord("i"): lambda raw: int.from_bytes(raw, "big", signed=True),
    ord("s"): _text,
    ord("b"): bytes,
}
_FIXED = {ord("d"): _FLOAT, ord("c"): _COMPLEX}
_BUILD: dict[int, Callable[..., object]] = {
    ord("L"): list,
    ord("T"): tuple,
    ord("S"): set,
    ord("F"): frozenset,
    ord("D"): dict,
}
