"""The codec: what crosses comes back equal and of exact types; hostile bytes never crash it nor turn into behaviour."""

from __future__ import annotations

import collections
import enum
import math
import random
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvr_sandbox.guest.codec import MAX_BYTES, MAX_DEPTH, CodecError, Opaque, decode, encode
from rlvr_sandbox.judging.equality import difference
from rlvr_sandbox.specs_code import CompareSpec
from rlvr_sandbox.typed_json import from_json, to_json

EXACT = (type(None), bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
STRICT = CompareSpec(tuples_as_lists=False, nan_equal=True)

atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**4000), max_value=2**4000)
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
)
keys = st.recursive(atoms, lambda part: st.tuples(part, part) | st.frozensets(part, max_size=3), max_leaves=4)
values = st.recursive(
    keys,
    lambda part: (
        st.lists(part, max_size=5)
        | st.lists(part, max_size=5).map(tuple)
        | st.dictionaries(keys, part, max_size=4)
        | st.sets(keys, max_size=4)
    ),
    max_leaves=20,
)


def parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        inner = [part for pair in value.items() for part in pair]
    else:
        inner = list(value) if isinstance(value, list | tuple | set | frozenset) else []
    return [value] + [leaf for part in inner for leaf in parts(part)]


@given(values)
def test_round_trip(value: object) -> None:
    back = decode(encode(value))
    assert repr(back) == repr(value) or difference(value, back, STRICT) is None
    assert all(type(part) in EXACT for part in parts(back))


@given(values)
def test_typed_json_round_trip(value: object) -> None:
    back = from_json(to_json(value))
    assert repr(back) == repr(value) or difference(value, back, STRICT) is None


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_random_bytes_are_a_value_or_refused(data: bytes) -> None:
    try:
        value = decode(data)
    except CodecError:
        return
    assert all(type(part) in EXACT for part in parts(value))


@given(values, st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_damaged_values_are_a_value_or_refused(value: object, source: random.Random) -> None:
    data = bytearray(encode(value))
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(data))
        data[place : place + source.randint(0, 2)] = source.randbytes(source.randint(0, 3))
        data = data or bytearray(b"?")
    try:
        decode(bytes(data))
    except CodecError:
        return


def test_a_hundred_thousand_hostile_frames_crash_nothing() -> None:
    source = random.Random(7)
    alphabet = b"ntfidcsbLTDSFo\0\0\0\0\0\0\1\2\3\xff"
    accepted = 0
    for _ in range(100_000):
        data = bytes(source.choices(alphabet, k=source.randint(1, 24)))
        try:
            accepted += decode(data) == ["value", 25]
        except CodecError:
            continue
    assert accepted == 0


class Int(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__

    def to_bytes(self, *_: Any, **__: Any) -> bytes:
        raise AssertionError

    def bit_length(self) -> int:
        raise AssertionError


class Items(list[int]):
    def __iter__(self) -> Any:
        raise AssertionError

    def __len__(self) -> int:
        return 99


class Table(dict[str, int]):
    def items(self) -> Any:
        raise AssertionError


class Text(str):
    def encode(self, *_: Any) -> bytes:
        return b"25"


Point = collections.namedtuple("Point", "x y")


class Colour(enum.IntEnum):
    RED = 3


@pytest.mark.parametrize(
    ("value", "flat"),
    [
        (Int(5), 5),
        (Items([1, 2]), [1, 2]),
        (Table(a=1), {"a": 1}),
        (Text("x"), "x"),
        (Point(1, 2), (1, 2)),
        (Colour.RED, 3),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(b=1), {"b": 1}),
        (type("Real", (float,), {"__float__": None})(-0.0), -0.0),
        (type("Raw", (bytes,), {})(b"x"), b"x"),
        (type("Group", (set,), {})({1}), {1}),
        (type("Group", (frozenset,), {})({1}), frozenset({1})),
        (type("Z", (complex,), {})(1j), 1j),
        ([Int(1), {Text("k"): Items([3])}], [1, {"k": [3]}]),
    ],
)
def test_subclasses_are_flattened_by_their_base(value: object, flat: object) -> None:
    back = decode(encode(value))
    assert repr(back) == repr(flat)
    assert all(type(part) in EXACT for part in parts(back))


@pytest.mark.parametrize("value", [object(), int, len, lambda: 0, range(3), iter([]), NotImplemented, ..., [object()]])
def test_what_is_no_data_is_refused(value: object) -> None:
    with pytest.raises(CodecError, match="no plain data"):
        encode(value)


def nested(depth: int) -> object:
    value: object = 0
    for _ in range(depth):
        value = [value]
    return value


def test_bounds_hold_on_both_sides() -> None:
    assert decode(encode(nested(MAX_DEPTH))) == nested(MAX_DEPTH)
    for value in (nested(MAX_DEPTH + 1), [0] * 200_000, "x" * MAX_BYTES, 1 << (8 * MAX_BYTES)):
        with pytest.raises(CodecError):
            encode(value)
    cycle: list[object] = []
    cycle.append(cycle)
    with pytest.raises(CodecError):
        encode(cycle)
    one = struct.pack(">I", 1)
    with pytest.raises(CodecError, match="deeper"):
        decode((b"L" + one) * 100_000 + b"n")
    with pytest.raises(CodecError, match="parts"):
        decode(b"L" + struct.pack(">I", 250_000) + b"n" * 250_000)
    with pytest.raises(CodecError, match="announced"):
        decode(b"L" + struct.pack(">I", 2**32 - 1) + b"n")
    with pytest.raises(CodecError, match="bytes"):
        decode(b"b" + struct.pack(">I", MAX_BYTES) + bytes(MAX_BYTES))


@pytest.mark.parametrize(
    "keys",
    [
        [number * (2**61 - 1) for number in range(3_000)],
        [tuple(-1 - (number >> bit & 1) for bit in range(12)) for number in range(4_096)],
    ],
)
def test_keys_made_to_collide_are_refused(keys: list[object]) -> None:
    body = b"".join(map(encode, keys))
    with pytest.raises(CodecError, match="hashes"):
        decode(b"S" + struct.pack(">I", len(keys)) + body)
    honest = {float(2**number) for number in range(900)} | set(range(-2_000, 2_000))
    assert decode(encode(honest)) == honest


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nn",
        b"i\0\0\0\x05\1",
        b"s\0\0\0\1\xff",
        b"S\0\0\0\2nn",
        b"S\0\0\0\1L\0\0\0\0",
        b"D\0\0\0\1L\0\0\0\0n",
        b"D\0\0\0\2tni\0\0\0\1\1n",
        b"o\0\0\0\1\0\0\0\0",
        b"d\0",
    ],
)
def test_malformed_values_are_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data)


def test_tokens_cross_only_where_asked_for() -> None:
    kept: list[object] = []

    def keep(value: object) -> Opaque:
        kept.append(value)
        return Opaque(len(kept) - 1, type(value).__name__)

    data = encode([1, {"k": math}], keep)
    assert decode(data, lambda token: kept[token.number]) == [1, {"k": math}]
    with pytest.raises(CodecError, match="module"):
        decode(data)
