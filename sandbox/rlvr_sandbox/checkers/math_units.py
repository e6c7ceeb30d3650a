"""Units behind a number: physical ones and money are compared, other nouns (``5 apples``) are mere labels."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_FOOT = Fraction(3048, 10_000)
_POUND = Fraction(45_359_237, 100_000)
_TABLE: dict[str, tuple[str, Fraction]] = {}
for _names, _dimension, _factor in (
    ("mm millimeter millimetre", "length", Fraction(1, 1000)),
    ("cm centimeter centimetre", "length", Fraction(1, 100)),
    ("dm decimeter decimetre", "length", Fraction(1, 10)),
    ("m meter metre", "length", Fraction(1)),
    ("km kilometer kilometre", "length", Fraction(1000)),
    ("in inch inche", "length", _FOOT / 12),
    ("ft foot feet", "length", _FOOT),
    ("yd yard", "length", 3 * _FOOT),
    ("mi mile", "length", 5280 * _FOOT),
    ("mg milligram", "mass", Fraction(1, 1000)),
    ("g gram", "mass", Fraction(1)),
    ("kg kilogram", "mass", Fraction(1000)),
    ("ton tonne", "tons", Fraction(1)),
    ("oz ounce", "mass", _POUND / 16),
    ("lb pound", "mass", _POUND),
    ("ms millisecond", "time", Fraction(1, 1000)),
    ("s sec second", "time", Fraction(1)),
    ("min minute", "time", Fraction(60)),
    ("h hr hour", "time", Fraction(3600)),
    ("day", "time", Fraction(86_400)),
    ("week", "time", Fraction(7 * 86_400)),
    ("month", "months", Fraction(1)),
    ("year yr", "months", Fraction(12)),
    ("ml milliliter millilitre", "volume", Fraction(1, 1000)),
    ("l liter litre", "volume", Fraction(1)),
    ("cent ¢", "dollars", Fraction(1, 100)),
    ("dollar usd $", "dollars", Fraction(1)),
    ("euro eur €", "euros", Fraction(1)),
    ("gbp £", "sterling", Fraction(1)),
    ("yuan rmb", "yuan", Fraction(1)),
    ("degree °", "angle", Fraction(1)),
    ("radian rad", "radians", Fraction(1)),
    ("mph", "mph", Fraction(1)),
    ("kph km/h", "kph", Fraction(1)),
):
    for _name in _names.split():
        _TABLE[_name] = (_dimension, _factor)

# Two letters and more, so that 5m may still be a product.
GLUED = frozenset(name for name in _TABLE if len(name) > 1 and name.isalpha() and name not in {"in", "day", "second"})
# Words that change what the number says; a number with one of them behind it is not read here.
_WORDS_OF_WORK = (
    "squared cubed plus minus times over divided by mod sin cos tan cot sec csc log ln exp sqrt pi max min gcd lcm inf "
    "infinity if for when where not but to than choose factorial power about half quarter thirds third"
)
_WORK = frozenset(_WORDS_OF_WORK.split())
_POWER = re.compile(r"\s*\^\s*\{?\s*([23])\s*\}?$")
_WORD = re.compile(r"[^\W\d_]+")


class Unit(NamedTuple):
    """A unit with a weight: its dimension (power included) and how many base units it is."""

    dimension: str
    factor: Fraction


class Label(NamedTuple):
    """What stands behind a number: a factor (``thousand``), a unit that counts, and the words as they are."""

    multiplier: int
    unit: Unit | None
    words: str


def _unit(words: str, power: int) -> Unit | None:
    for prefix, prefixed in (("square ", 2), ("cubic ", 3), ("sq ", 2), ("sq. ", 2)):
        if words.startswith(prefix):
            words, power = words.removeprefix(prefix), prefixed
    entry = _TABLE.get(words) or _TABLE.get(words.removesuffix("s")) or _TABLE.get(words.removesuffix("es"))
    if entry is None:
        return None
    dimension, factor = entry
    return Unit(f"{dimension}^{power}" if power > 1 else dimension, factor**power)


def read_label(text: str) -> Label | None:
    """What the text behind a number means; ``None`` where it is no unit or noun."""
    power = 1
    if found := _POWER.search(text):
        power, text = int(found[1]), text[: found.start()]
    words = " ".join(text.split()).strip(" .").casefold()
    multiplier = 1
    while (first := words.split(" ", 1))[0] in MULTIPLIERS:
        multiplier *= MULTIPLIERS[first[0]]
        words = first[1] if len(first) > 1 else ""
    if words and not all(_WORD.fullmatch(word) or word in _TABLE for word in words.replace(".", "").split()):
        return None
    if any(word in _WORK for word in words.split()):
        return None
    return Label(multiplier, _unit(words, power) if words else None, words if power == 1 else f"{words}^{power}")
