r"""Cutting unified text outside its brackets: lists, equation chains, names."""

from __future__ import annotations

import functools
import re

COMMA = ","
EQUALS = r"="
APPROX = r"\\approx(?![a-z])"
STRONG = (
    r";|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or|AND|OR)(?![a-z])"
    r"|\\(?:lor|land|vee|wedge)(?![a-z])"
)
OR = r"\\text\s*\{\s*or\s*\}|(?<![A-Za-z\\])or(?![a-z])|\\lor(?![a-z])|\\cup(?![a-z])"

_BRACKET = r"\\\{|\\\}|[()\[\]{}]"
_OPENING = frozenset({"(", "[", "{", "\\{"})
_NAME = re.compile(
    r"\\?[A-Za-z]{1,12}'?(?:_(?:\{[^{}]{1,12}\}|\w))?(?:\s?\([A-Za-z0-9, ]{1,12}\))?|\|[A-Z]{1,3}\|"
    r"|\\angle ?[A-Z]{1,3}|\((?:\s?\\?[A-Za-z]{1,8}(?:_\w)?\s?,?){2,6}\)"
)
# An equals sign of another relation, or a claim that is not an equation.
_OTHER_RELATION = re.compile(r"[<>!:=~]=|\\ne(?![a-z])|\\equiv")


@functools.cache
def _cutter(separator: str) -> re.Pattern[str]:
    return re.compile(rf"(?P<cut>{separator})|{_BRACKET}")


def split(text: str, separator: str) -> list[str]:
    """``text`` cut at the matches of ``separator`` outside brackets; a bracket of any kind closes any other."""
    parts: list[str] = []
    depth = start = 0
    for found in _cutter(separator).finditer(text):
        if found["cut"] is None:
            depth += 1 if found.group() in _OPENING else -1
        elif depth == 0:
            parts.append(text[start : found.start()].strip())
            start = found.end()
    return [*parts, text[start:].strip()]


def is_wrapped(text: str) -> bool:
    """Whether the first bracket opens at the start of ``text`` and closes at its end."""
    depth = 0
    for bracket in re.finditer(_BRACKET, text):
        if depth == 0 and bracket.start() > 0:
            return False
        depth += 1 if bracket.group() in _OPENING else -1
        if depth == 0:
            return bracket.end() == len(text)
    return False


def is_name(text: str) -> bool:
    """Whether ``text`` is a name for a value, such as ``x_1``, ``f(2)``, ``|AB|`` or ``(p,q)``."""
    return _NAME.fullmatch(text.strip()) is not None


def elements(text: str) -> list[str]:
    """The elements of a bare list, ``3, 4`` or ``3 or 4``; the text alone where it is none."""
    strong = split(text, STRONG)
    if len(strong) > 1 and ";" in text and any(len(split(part, COMMA)) > 1 for part in strong):
        return [text]
    parts = [part for whole in strong for part in split(whole, COMMA)]
    # "19, 46, and 82" leaves nothing between its last two separators.
    return [part for part in parts if part] if len(parts) > 1 else [text]


def equated(text: str) -> list[str]:
    """The sides of a chain of equations; the text alone where it has other relations or none."""
    return [text.strip()] if _OTHER_RELATION.search(text) else split(text, EQUALS)


def sides(text: str) -> list[str]:
    r"""The sides of an equation chain without its leading name; ``a \approx b`` is cut to the exact ``a``."""
    if len(split(text, f"{STRONG}|{COMMA}")) > 1:
        return [text]
    exact = split(text, APPROX)
    parts = equated(exact[1] if len(exact) > 1 and is_name(exact[0]) else exact[0])
    return parts[1:] if len(parts) > 1 and is_name(parts[0]) else parts
