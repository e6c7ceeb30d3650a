r"""Parts of the real line: intervals, their unions with sets of points, and inequalities of one variable."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from rlvr_sandbox.checkers.math_numbers import read_number
from rlvr_sandbox.checkers.math_split import COMMA, OR, is_name, is_wrapped, split
from rlvr_sandbox.checkers.math_values import Piece, Region, region

WHOLE_LINE = frozenset({r"\mathbb{R}", r"\mathbb R", r"\Bbb{R}", r"\R", r"\text{all real numbers}", "all real numbers"})

_INFINITE = re.compile(r"(?P<sign>[+-]?)\s*(?:\\infty|inf(?:inity)?)")
_RELATION = r"<=|>=|\\le(?![a-z])|\\ge(?![a-z])|<|>"
_CUP = r"\\cup(?![a-z])"
_SPELLED = {r"\le": "<=", r"\ge": ">="}
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}

End = Fraction | float


def _end(text: str) -> End | None:
    if infinite := _INFINITE.fullmatch(text):
        return -math.inf if infinite["sign"] == "-" else math.inf
    number = read_number(text)
    return number.value if number else None


def read_interval(text: str) -> Piece | None:
    """The interval that brackets around two ends stand for; ``None`` where the text is anything else."""
    if len(text) < 5 or text[0] not in "([" or text[-1] not in ")]" or not is_wrapped(text):
        return None
    ends = split(text[1:-1], "[,;]")
    low, high = (_end(ends[0]), _end(ends[1])) if len(ends) == 2 else (None, None)
    if low is None or high is None or low > high:
        return None
    return Piece(low, high, text[0] == "(" or low == -math.inf, text[-1] == ")" or high == math.inf)


def read_union(text: str) -> Region | None:
    r"""Intervals and sets of points joined by ``\cup``, or the whole line; ``None`` where it is anything else."""
    if text in WHOLE_LINE:
        return Region((Piece(-math.inf, math.inf, True, True),))
    parts = split(text, _CUP)
    if len(parts) == 1:
        return None
    pieces: list[Piece] = []
    for part in parts:
        found = _points(part) if part.startswith("\\{") else [read_interval(part)]
        if not all(found):
            return None
        pieces += [piece for piece in found if piece]
    return region(pieces)


def _points(text: str) -> list[Piece | None]:
    r"""The points of ``\{1, 2\}``."""
    ends = [_end(point) for point in split(text[2:-2], COMMA)] if text.endswith("\\}") else [None]
    return [None if end is None else Piece(end, end, False, False) for end in ends]


def read_inequalities(text: str) -> Region | None:
    """Inequalities of one variable joined by ``or``; ``None`` where the text is anything else."""
    if not re.search(_RELATION, text):
        return None
    found = [_inequality(part) for part in split(text, OR)]
    regions = [one for one in found if one is not None]
    if len(regions) < len(found) or len({one.name for one in regions}) > 1:
        return None
    return region([piece for one in regions for piece in one.pieces], regions[0].name)


def _inequality(text: str) -> Region | None:
    parts = split(text, _RELATION)
    kinds = [_SPELLED.get(sign, sign) for sign in re.findall(_RELATION, text)]
    if len(kinds) != len(parts) - 1 or len(parts) not in (2, 3):
        return None
    if len(parts) == 2:
        if not is_name(parts[0]):
            parts, kinds = parts[::-1], [_FLIPPED[kinds[0]]]
        # A half line is a chain whose missing end is infinite.
        less = kinds[0][0] == "<"
        parts = ["-\\infty", *parts] if less else ["\\infty", *parts]
        kinds = [kinds[0][0], kinds[0]]
    if kinds[0][0] != kinds[1][0] or not is_name(parts[1]):
        return None
    if kinds[0][0] == ">":
        parts, kinds = parts[::-1], kinds[::-1]
    low, high = _end(parts[0]), _end(parts[2])
    if low is None or high is None:
        return None
    opens = [not kind.endswith("=") for kind in kinds]
    return region([Piece(low, high, opens[0], opens[1])], parts[1].replace(" ", ""))
