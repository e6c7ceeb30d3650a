r"""Exact rational values of number literals and plain arithmetic, bounded in size, without sympy.

Reads integers, decimals (also repeating ones, ``0.1\overline{6}``), thousands separators, scientific notation,
fractions, mixed numbers, powers with integer exponents, factorials and the four operations. Everything else is declined
with ``None``, never guessed.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

MAX_BITS = 4_096
MAX_FACTORIAL = 400

_GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]+)?")
_PLAIN = re.compile(r"[+-]? ?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_TOKEN = re.compile(
    r"\s*(?:(?P<repeating>[0-9]*\.[0-9]*\\(?:overline|dot)\s*(?:\{[0-9]+\}|[0-9]))"
    r"|(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4}(?![0-9A-Za-z.]))?)"
    r"|(?P<frac>\\frac)|(?P<times>\\times|\\cdot|\*(?!\*))|(?P<over>\\div|/)|(?P<power>\^|\*\*)|(?P<sign>[+-])"
    r"|(?P<open>[({])|(?P<close>[)}])|(?P<bang>!))"
)
_MIXED_GAP = re.compile(r"(?P<whole>[0-9]+) +(?P<top>[0-9]+) ?/ ?(?P<bottom>[0-9]+)")


class Number(NamedTuple):
    """An exact value, and whether the text was a literal rather than arithmetic that is left to do."""

    value: Fraction
    literal: bool


class _Declined(Exception):  # noqa: N818 - not an error: the text is for another stage
    """The text is not one of the forms that are read here, or its value is too large."""


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _Declined
    return value


def _decimal(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > MAX_BITS // 4 or abs(int(exponent or 0)) > MAX_BITS // 4:
        raise _Declined
    return _bounded(Fraction(mantissa.rstrip(".") + ("e" + exponent if exponent else "")))


def _repeating(text: str) -> Fraction:
    r"""Value of ``0.1\overline{6}``: the repeating digits are a geometric series."""
    head, tail = re.split(r"\\(?:overline|dot)\s*", text)
    digits = tail.strip("{}")
    places = len(head.partition(".")[2])
    fixed = Fraction(head.replace(".", "") or "0") / 10**places
    return _bounded(fixed + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places))


class _Arithmetic:
    """Recursive descent over tokens; ``literal`` turns false at the first operation that is left to do."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text):
            token = _TOKEN.match(text, at)
            if token is None or token.lastgroup is None:
                raise _Declined
            self._tokens.append((token.lastgroup, token[token.lastgroup]))
            at = token.end()
        self._at = 0
        self.literal = True

    def value(self) -> Fraction:
        """The value of the whole text."""
        value = self._sum()
        if self._at < len(self._tokens):
            raise _Declined
        return value

    def _kind(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    def _take(self, kind: str) -> str:
        if self._kind() != kind:
            raise _Declined
        self._at += 1
        return self._tokens[self._at - 1][1]

    def _sum(self) -> Fraction:
        value = self._product()
        while self._kind() == "sign":
            self.literal = False
            value = _bounded(value + self._product())
        return value

    def _product(self) -> Fraction:
        """A signed product; the sign binds looser than a power, so ``-2^2`` is -4."""
        sign = 1
        while self._kind() == "sign":
            sign *= -1 if self._take("sign") == "-" else 1
        value = self._power()
        while (kind := self._kind()) in ("times", "over"):
            start = self._at
            self._take(kind)
            right = self._power()
            if kind == "over" and right == 0:
                raise _Declined
            self.literal = self.literal and (self._is_ratio(start) or self._is_power_of_ten(start, right))
            value = _bounded(value * right if kind == "times" else value / right)
        return sign * value

    def _is_ratio(self, operator: int) -> bool:
        """Whether the operator stands between the only two numbers: ``1/2`` is a literal, ``1/2/3`` is work."""
        tokens = [kind for kind, _ in self._tokens if kind != "sign"]
        return self._tokens[operator][0] == "over" and tokens == ["number", "over", "number"]

    def _is_power_of_ten(self, operator: int, right: Fraction) -> bool:
        r"""Whether this is the end of scientific notation, ``3.5 \times 10^{-4}``."""
        base = self._tokens[operator + 1 : operator + 3]
        before = self._tokens[:operator]
        return base == [("number", "10"), ("power", base[-1][1])] and [k for k, _ in before if k != "sign"] == [
            "number"
        ]

    def _power(self) -> Fraction:
        base = self._factorial()
        if self._kind() != "power":
            return base
        self._take("power")
        exponent = self._exponent()
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator != 1 or abs(exponent) * size > MAX_BITS or (base == 0 and exponent <= 0):
            raise _Declined
        return _bounded(base ** int(exponent))

    def _exponent(self) -> Fraction:
        sign = -1 if self._kind() == "sign" and self._take("sign") == "-" else 1
        return sign * self._power()

    def _factorial(self) -> Fraction:
        value = self._atom()
        if self._kind() == "bang":
            self._take("bang")
            self.literal = False
            if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL or self._kind() == "bang":
                raise _Declined
            return Fraction(math.factorial(int(value)))
        return value

    def _atom(self) -> Fraction:
        kind = self._kind()
        if kind == "number":
            return self._number()
        if kind == "repeating":
            return _repeating(self._take("repeating"))
        if kind == "frac":
            return self._fraction()
        return self._group()

    def _number(self) -> Fraction:
        whole = self._take("number")
        if self._kind() != "frac":
            return _decimal(whole)
        # 3\frac{1}{2} is a mixed number; a product would be written with a dot.
        part = self._fraction()
        if not (whole.isdecimal() and 0 <= part < 1):
            raise _Declined
        return _decimal(whole) + part

    def _group(self) -> Fraction:
        opening = self._take("open")
        value = self._sum()
        if self._take("close") != {"(": ")", "{": "}"}[opening]:
            raise _Declined
        return value

    def _fraction(self) -> Fraction:
        self._take("frac")
        top, bottom = self._argument(), self._argument()
        if bottom == 0:
            raise _Declined
        return _bounded(top / bottom)

    def _argument(self) -> Fraction:
        r"""An argument of ``\frac``: a group, or the next digit alone as in ``\frac12``."""
        if self._kind() != "number":
            return self._group()
        text = self._take("number")
        if len(text) > 1:
            self._at -= 1
            self._tokens[self._at] = ("number", text[1:])
        if not text[0].isdecimal():
            raise _Declined
        return Fraction(text[0])


def read_number(text: str) -> Number | None:
    """The exact value of ``text``, already unified; ``None`` where it is not one of the forms above."""
    text = text.strip()
    try:
        if _PLAIN.fullmatch(text):
            return Number(_decimal(text.replace(" ", "")), True)
        if _GROUPED.fullmatch(text):
            return Number(_decimal(re.sub("[, ]", "", text)), True)
        sign, rest = (-1, text[1:].strip()) if text.startswith("-") else (1, text.removeprefix("+").strip())
        if mixed := _MIXED_GAP.fullmatch(rest):
            whole, top, bottom = (_decimal(mixed[name]) for name in ("whole", "top", "bottom"))
            return Number(sign * (whole + top / bottom), True) if top < bottom else None
        arithmetic = _Arithmetic(text)
        return Number(arithmetic.value(), arithmetic.literal)
    except (_Declined, RecursionError):
        return None
