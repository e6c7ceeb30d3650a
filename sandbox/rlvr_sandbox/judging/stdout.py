"""Comparing what a program printed with what it should have printed, both as bytes."""

from __future__ import annotations

import math
import re

from rlvr_sandbox.specs_code import CompareSpec

# Longer words are compared as text: nobody prints a number so, and reading one can take quadratic time.
MAX_NUMBER_BYTES = 64

_NUMBER = re.compile(rb"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_INTEGER = re.compile(rb"[+-]?\d+")


def printed_the_same(expected: bytes, printed: bytes, compare: CompareSpec) -> bool:
    """Whether ``printed`` counts as ``expected``; never where nothing is expected, unless ``allow_empty``."""
    if not expected.strip() and not compare.allow_empty:
        return False
    if compare.ignore_case:
        expected, printed = expected.lower(), printed.lower()
    if compare.output == "exact":
        return expected == printed
    if compare.output == "tokens":
        return _same_words(expected.split(), printed.split(), compare)
    wanted, given = _lines(expected), _lines(printed)
    return len(wanted) == len(given) and all(_same_line(*pair, compare) for pair in zip(wanted, given, strict=True))


def _lines(text: bytes) -> list[bytes]:
    return [line.rstrip() for line in text.rstrip().split(b"\n")]


def _same_line(expected: bytes, printed: bytes, compare: CompareSpec) -> bool:
    if expected == printed:
        return True
    if not compare.float_abs and not compare.float_rel:
        return False
    return _same_words(expected.split(), printed.split(), compare)


def _same_words(expected: list[bytes], printed: list[bytes], compare: CompareSpec) -> bool:
    return len(expected) == len(printed) and all(
        wanted == given or _close(wanted, given, compare) for wanted, given in zip(expected, printed, strict=True)
    )


def _close(expected: bytes, printed: bytes, compare: CompareSpec) -> bool:
    """Whether both are numbers within the tolerances; two integers have none."""
    if not compare.float_abs and not compare.float_rel:
        return False
    if max(len(expected), len(printed)) > MAX_NUMBER_BYTES:
        return False
    if not _NUMBER.fullmatch(expected) or not _NUMBER.fullmatch(printed):
        return False
    if _INTEGER.fullmatch(expected) and _INTEGER.fullmatch(printed):
        return int(expected) == int(printed)
    numbers = float(expected), float(printed)
    return all(map(math.isfinite, numbers)) and math.isclose(
        *numbers, rel_tol=compare.float_rel, abs_tol=compare.float_abs
    )
