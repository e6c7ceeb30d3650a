r"""From unified text to exact values: numbers, quantities, ± pairs, lists, tuples, sets, intervals, inequalities.

``read`` gives every value that the text may stand for (``(1,2)`` is a pair and an open interval) and nothing where the
text is not of these forms; it never guesses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rlvr_sandbox.checkers.math_regions import read_inequalities, read_interval, read_union
from rlvr_sandbox.checkers.math_scalars import read_pair, read_scalar
from rlvr_sandbox.checkers.math_split import elements, equated, is_name, is_wrapped, split
from rlvr_sandbox.checkers.math_values import Brackets, Listing, Readings, Region, Value

MAX_DEPTH = 12

_GROUPED = re.compile(r"(?<![0-9,.])([0-9]{1,3})((?:,[0-9]{3})+)(?![0-9]|,[0-9])")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_IN = r"\\in(?![a-z])"
_EMPTY = frozenset({r"\emptyset", r"\{\}", r"\{ \}"})
_KINDS: dict[tuple[str, str], Brackets] = {
    ("(", ")"): "round",
    ("[", "]"): "square",
    ("\\{", "\\}"): "curly",
    ("{", "}"): "curly",
}


def read(text: str, *, decimal_comma: bool = False) -> Readings:
    """Every value that the unified ``text`` may stand for; empty where it is declined."""
    readings = tuple(_readings(text.strip(), MAX_DEPTH))
    if decimal_comma and _DECIMAL_COMMA.fullmatch(text):
        readings += tuple(_scalar(text.replace(",", ".")))
    return readings


def _scalar(text: str) -> Iterator[Value]:
    value = read_scalar(text)
    if value is not None:
        yield value


def _readings(text: str, depth: int) -> Iterator[Value]:
    """``depth`` bounds the nesting of lists, sets and tuples."""
    if not text or depth == 0:
        return
    inequalities = read_inequalities(text)
    if inequalities is not None:
        yield inequalities
        return
    if _GROUPED.search(text):
        # 1,234 is a number and, less often, a list.
        yield from _readings(_GROUPED.sub(lambda group: group[0].replace(",", ""), text), depth)
    found = elements(text)
    if len(found) > 1:
        yield from _listing("bare", found, depth)
        return
    yield from _single(text, depth)


def _single(text: str, depth: int) -> Iterator[Value]:
    """Readings of a text that lists nothing outside brackets."""
    member = split(text, _IN)
    if len(member) == 2 and is_name(member[0]):
        yield from _readings(member[1], depth - 1)
        return
    union = read_union(text)
    pair = read_pair(text) if union is None else None
    if union is not None or pair is not None:
        yield union or pair  # type: ignore[misc]
    elif text in _EMPTY:
        yield Listing("curly", ())
    elif is_wrapped(text):
        yield from _bracketed(text, depth)
    else:
        yield from _scalar(text)


def _bracketed(text: str, depth: int) -> Iterator[Value]:
    """A set, a tuple, an interval or a group, where brackets hold the whole text."""
    if (interval := read_interval(text)) is not None:
        yield Region((interval,)) if interval.low < interval.high else Region(())
    opening = "\\{" if text.startswith("\\{") else text[0]
    closing = "\\}" if text.endswith("\\}") else text[-1]
    kind = _KINDS.get((opening, closing))
    if kind is None:
        return
    inner = text[len(opening) : len(text) - len(closing)].strip()
    found = elements(inner)
    if len(found) > 1 or opening in ("\\{", "["):
        yield from _listing(kind, found, depth - 1)
    else:
        yield from _readings(inner, depth - 1)


def _listing(brackets: Brackets, found: Sequence[str], depth: int) -> Iterator[Value]:
    """The list of the elements ``found``; nothing where one of them is declined."""
    names: list[str] = []
    items: list[Readings] = []
    for element in found:
        parts = equated(element)
        if len(parts) == 2 and is_name(parts[0]):
            names.append(parts[0].replace(" ", ""))
        elif len(parts) > 1:
            return
        readings = tuple(_readings(parts[-1], depth - 1))
        if not readings:
            return
        pair = read_pair(parts[-1])
        items += pair.items if pair and brackets != "round" else [readings]
    distinct = len(set(names)) == len(names) == len(items) > 1
    yield Listing(brackets, tuple(items), tuple(names) if distinct else ())
