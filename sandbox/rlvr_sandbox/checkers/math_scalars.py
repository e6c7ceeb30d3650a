r"""Numbers with what stands around them: percent signs, units, currencies, bases, and ``\pm`` pairs."""

from __future__ import annotations

import re
from fractions import Fraction

from rlvr_sandbox.checkers.math_numbers import read_number
from rlvr_sandbox.checkers.math_split import split
from rlvr_sandbox.checkers.math_units import GLUED, Unit, read_label
from rlvr_sandbox.checkers.math_values import Listing, Numeral, Quantity, Readings

_SIGN = r"(?:\\?%|(?:percent(?:age)?|pct)\b)"
_PERCENT = re.compile(rf"(?<=[0-9)}}])\s*(?:{_SIGN}|\\text\s*\{{\s*{_SIGN}\s*\}})$", re.IGNORECASE)
_DEGREES = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?(?:\s*\\text\s*\{\s*[CF]\s*\})?$")
_CURRENCY = re.compile(r"(?P<sign>[+-]?)\s*(?P<mark>\\\$|€|£|\\text\s*\{\s*(?:\\?\$|USD)\s*\})\s*(?=[0-9.])")
_TEXT_UNIT = re.compile(r"\s*\\text\s*\{(?P<words>[^{}]*)\}\s*(?P<power>\^\s*\{?\s*[23]\s*\}?)?$")
_WORD_UNIT = re.compile(
    r"(?<=[0-9})])\s(?P<words>[A-Za-z]{2}[A-Za-z. ]{0,60}|[mgshlL])(?P<power>\s?\^\s?\{?[23]\}?)?$"
    r"|(?<=[0-9])\s?(?P<mark>[€£¢]|\\\$)$"
)
_GLUED_UNIT = re.compile(r"(?<=[0-9})])(?P<words>[A-Za-z]{2,10})(?P<power>\^\{?[23]\}?)?$")
_NUMERAL = re.compile(r"\(?(?P<digits>[0-9A-Fa-f]+)\)?_\s*\{?\s*(?P<base>[0-9]{1,2})\s*\}?")
_PLUS_MINUS = r"\\pm(?![a-z])"


def read_scalar(text: str) -> Quantity | Numeral | None:
    """One number and what stands around it; ``None`` where the text is anything else."""
    if (number := read_number(text)) is not None:
        return Quantity(number.value, literal=number.literal)
    if numeral := _NUMERAL.fullmatch(text):
        return _numeral(numeral["digits"].upper().lstrip("0") or "0", int(numeral["base"]))
    if percent := _PERCENT.search(text):
        number = read_number(text[: percent.start()])
        return Quantity(number.value, percent=True, literal=number.literal) if number else None
    if currency := _CURRENCY.match(text):
        mark = {"€": "€", "£": "£"}.get(currency["mark"], "$")
        # "$5 million" has a multiplier behind, so the currency becomes a word behind as well.
        return _labelled(currency["sign"] + text[currency.end() :], mark)
    return _labelled(text, "")


def _numeral(digits: str, base: int) -> Numeral | None:
    return Numeral(digits, base) if 2 <= base <= 16 and all(int(digit, 16) < base for digit in digits) else None


def _labelled(text: str, currency: str) -> Quantity | None:
    """A number with words behind it."""
    head, words = text, ""
    if degrees := _DEGREES.search(text):
        head, words = text[: degrees.start()], "degrees"
    elif found := _TEXT_UNIT.search(text) or _WORD_UNIT.search(text) or _GLUED_UNIT.search(text):
        groups = found.groupdict()
        head, words = text[: found.start()], (groups["words"] or groups["mark"].strip("\\")) + (groups["power"] or "")
        if found.re is _GLUED_UNIT and groups["words"].casefold() not in GLUED:
            return None
    number, label = read_number(head), read_label(f"{words} {currency}".strip() if currency not in words else words)
    if number is None or label is None:
        return None
    return Quantity(number.value * label.multiplier, unit=label.unit, words=label.words, literal=number.literal)


def read_pair(text: str) -> Listing | None:
    r"""The set of two numbers that ``1 \pm 2`` or ``\pm 3`` stands for; ``None`` where the text is anything else."""
    parts = split(text, _PLUS_MINUS)
    if len(parts) != 2:
        return None
    middle, distance = read_number(parts[0] or "0"), read_number(parts[1])
    if middle is None or distance is None:
        return None
    ends: tuple[Fraction, ...] = (middle.value - distance.value, middle.value + distance.value)
    items: tuple[Readings, ...] = tuple((Quantity(end),) for end in ends)
    return Listing("curly", items)


def unit_behind(text: str) -> Unit | None:
    """The unit that counts behind any expression, numbers or not; ``None`` without one."""
    found = _TEXT_UNIT.search(text) or _WORD_UNIT.search(text)
    if found is None:
        return None
    label = read_label((found["words"] or "") + (found["power"] or ""))
    return label.unit if label else None
