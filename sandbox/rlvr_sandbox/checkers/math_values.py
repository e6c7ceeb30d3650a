"""Exact values that answers stand for, and when two of them are the same answer under a policy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from rlvr_sandbox.checkers.math_units import Unit

Brackets = Literal["round", "square", "curly", "bare"]


@dataclass(frozen=True, slots=True)
class Policy:
    """How answers are compared; the fields are those of ``MathSpec`` and explained in ``math_answer``."""

    percent: str = "gold"
    units: str = "gold"
    tolerance: float | None = None
    ordered: bool | None = None
    chain: str = "all"
    decimal_comma: bool = False
    evaluated: bool = False
    reading: str = "exact"

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Policy:
        """The policy in a spec, which may leave every field out."""
        return cls(**{key: value for key, value in spec.items() if key != "answer"})

    def with_work(self) -> Policy:
        """The same policy for a side of an equation that shows the work."""
        return replace(self, evaluated=False)

    def close(self, gold: Fraction, answer: Fraction) -> bool:
        """Whether two numbers are the same: exactly, or within the relative tolerance."""
        if self.tolerance is None:
            return gold == answer
        return abs(answer - gold) <= Fraction(self.tolerance) * (abs(gold) or 1)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with what stands around it.

    Attributes:
        value: The number as written, multipliers included, percent sign and unit not.
        percent: Whether a percent sign follows.
        unit: The unit that counts, if any.
        words: Every word behind the number, for strict comparison.
        literal: Whether it is written as a number and not as arithmetic to do.
    """

    value: Fraction
    percent: bool = False
    unit: Unit | None = None
    words: str = ""
    literal: bool = True


@dataclass(frozen=True, slots=True)
class Numeral:
    """A number written in a named base; the notation is part of the answer, so it equals no bare number."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Listing:
    """Several answers. Each item is the tuple of its readings; ``names`` holds distinct names where all have one."""

    brackets: Brackets
    items: tuple[Readings, ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval, or a point where its closed ends coincide; ends may be infinite floats."""

    low: Fraction | float
    high: Fraction | float
    low_open: bool
    high_open: bool


@dataclass(frozen=True, slots=True)
class Region:
    """A union of pieces of the real line in normal form (see ``region``); ``name`` is the variable, if one is named."""

    pieces: tuple[Piece, ...]
    name: str = ""


Value = Quantity | Numeral | Listing | Region
Readings = tuple[Value, ...]


def region(pieces: Sequence[Piece], name: str = "") -> Region:
    """The union of ``pieces``: empty ones dropped, sorted, those that overlap or touch merged."""
    merged: list[Piece] = []
    kept = [p for p in pieces if p.low < p.high or (p.low == p.high and not (p.low_open or p.high_open))]
    for piece in sorted(kept, key=lambda p: (p.low, p.low_open)):
        last = merged[-1] if merged else None
        if last is None or piece.low > last.high or (piece.low == last.high and piece.low_open and last.high_open):
            merged.append(piece)
            continue
        high, closed = max((last.high, not last.high_open), (piece.high, not piece.high_open))
        merged[-1] = Piece(last.low, high, last.low_open, not closed)
    return Region(tuple(merged), name)


def same(gold: Readings, answer: Readings, policy: Policy) -> bool:
    """Whether some reading of the answer is the reference in some reading."""
    return any(_same(one, other, policy) for one in gold for other in answer)


def _same(gold: Value, answer: Value, policy: Policy) -> bool:
    if isinstance(gold, Quantity) and isinstance(answer, Quantity):
        return _same_quantity(gold, answer, policy)
    if isinstance(gold, Listing) and isinstance(answer, Listing):
        return _same_listing(gold, answer, policy)
    if isinstance(gold, Region) and isinstance(answer, Region):
        return _same_region(gold, answer, policy)
    if isinstance(gold, Numeral):
        return gold == answer
    if isinstance(gold, Listing):
        return (_is_single(gold) and same(gold.items[0], (answer,), policy)) or _same_points(answer, gold, policy)
    if isinstance(answer, Listing):
        return (_is_single(answer) and same((gold,), answer.items[0], policy)) or _same_points(gold, answer, policy)
    return False


def _is_single(listing: Listing) -> bool:
    return len(listing.items) == 1 and listing.brackets in ("curly", "bare")


def _same_points(whole: Value, points: Listing, policy: Policy) -> bool:
    """Whether a region consists of the isolated points that a set lists."""
    if not isinstance(whole, Region) or points.brackets != "curly":
        return False
    if not all(piece.low == piece.high for piece in whole.pieces):
        return False
    items = tuple((Quantity(Fraction(piece.low)),) for piece in whole.pieces)
    return _same_listing(Listing("curly", items), points, policy)


def _same_quantity(gold: Quantity, answer: Quantity, policy: Policy) -> bool:
    if policy.evaluated and gold.literal and not answer.literal:
        return False
    scale = Fraction(1)
    if policy.units == "strict" and gold.unit is None and gold.words != answer.words:
        return False
    if policy.units != "ignore" and (gold.unit is not None or answer.unit is not None):
        if gold.unit is None or answer.unit is None:
            if policy.units == "strict":
                return False
        elif gold.unit.dimension != answer.unit.dimension:
            return False
        else:
            scale = answer.unit.factor / gold.unit.factor
    golds = _percent_readings(gold, bare=policy.percent != "value")
    answers = _percent_readings(answer, bare=policy.percent == "ignore" or (gold.percent and policy.percent == "gold"))
    return any(policy.close(one, other * scale) for one in golds for other in answers)


def _percent_readings(quantity: Quantity, *, bare: bool) -> tuple[Fraction, ...]:
    """The values that a quantity may stand for: ``50%`` is 1/2 and, where ``bare``, also 50."""
    if not quantity.percent:
        return (quantity.value,)
    return (quantity.value / 100, quantity.value) if bare else (quantity.value / 100,)


def _same_listing(gold: Listing, answer: Listing, policy: Policy) -> bool:
    if gold.names and answer.names:
        named = dict(zip(answer.names, answer.items, strict=True))
        return sorted(gold.names) == sorted(answer.names) and all(
            same(item, named[name], policy) for name, item in zip(gold.names, gold.items, strict=True)
        )
    kinds = {gold.brackets, answer.brackets}
    if policy.ordered is None and len(kinds - {"bare"}) > 1:
        return False
    in_order = policy.ordered
    if in_order is None:
        in_order = bool(kinds & {"round", "square"} or gold.names or answer.names)
    if in_order:
        return len(gold.items) == len(answer.items) and all(
            same(one, other, policy) for one, other in zip(gold.items, answer.items, strict=True)
        )
    repeats = any(same(one, other, policy) for one, other in itertools.combinations(gold.items, 2))
    if "curly" in kinds or not repeats:
        return all(any(same(one, other, policy) for other in answer.items) for one in gold.items) and all(
            any(same(one, other, policy) for one in gold.items) for other in answer.items
        )
    return len(gold.items) == len(answer.items) and _matched(gold.items, answer.items, policy)


def _matched(golds: Sequence[Readings], answers: Sequence[Readings], policy: Policy) -> bool:
    """Whether each reference has an answer of its own."""
    left = list(answers)
    for gold in golds:
        found = next((index for index, answer in enumerate(left) if same(gold, answer, policy)), None)
        if found is None:
            return False
        del left[found]
    return True


def _same_region(gold: Region, answer: Region, policy: Policy) -> bool:
    if (gold.name and answer.name and gold.name != answer.name) or len(gold.pieces) != len(answer.pieces):
        return False
    return all(
        (one.low_open, one.high_open) == (other.low_open, other.high_open)
        and _same_end(one.low, other.low, policy)
        and _same_end(one.high, other.high, policy)
        for one, other in zip(gold.pieces, answer.pieces, strict=True)
    )


def _same_end(gold: Fraction | float, answer: Fraction | float, policy: Policy) -> bool:
    if isinstance(gold, Fraction) and isinstance(answer, Fraction):
        return policy.close(gold, answer)
    return gold == answer
