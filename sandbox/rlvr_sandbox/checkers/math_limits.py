r"""What is refused in words before anything expensive sees it: long, deep, or astronomically large answers.

The sizes of towers, powers, factorials and binomials are estimated from the text, before anything evaluates them.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from rlvr_sandbox.checkers.math_numbers import read_number

MAX_CHARS = 4_096
MAX_NESTING = 50
MAX_DIGITS = 1_000
MAX_SEPARATORS = 600
MAX_POWER_DIGITS = 2_000
MAX_SYMBOLIC_POWER = 400
MAX_STACKED_POWER = 10_000
MAX_FUNCTIONS = 12
MAX_FACTORIAL = 1_000
MAX_BINOMIAL = 5_000
# What sympy may be asked to work on; exact values are bounded by the limits above alone.
MAX_SYMBOLIC_CHARS = 1_500
MAX_SYMBOLIC_LISTED = 64
MAX_CELLS = 64
MAX_OPERATIONS = 120

NEARBY_CHARS = 60

_BRACKET = re.compile(r"\\[{}]|[()\[\]{}]")
_DIGIT_RUN = re.compile(r"[0-9]+")
_POWER = re.compile(r"(?:(?P<base>[0-9]+(?:\.[0-9]+)?|(?<![A-Za-z])e|\\pi)|(?P<group>[)}]))?\s*(?:\^|\*\*)\s*")
_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?")
_CONSTANT = re.compile(r"\\pi(?![a-z])|(?<![A-Za-z\\])e(?![A-Za-z])")
_ROOT = re.compile(r"\\sqrt(?:\s*\[[^\[\]]{0,20}\])?")
_LETTER = re.compile(r"[A-Za-z]")
_FACTORIAL = re.compile(r"(?:(?P<number>[0-9]+)|(?P<group>[)}]))\s*!")
_BINOMIAL = re.compile(r"\\[dt]?binom|\\choose|\\Gamma|\\zeta")
_OPEN_WORK = re.compile(r"\\(?:i*int|oint|sum|prod|lim|limsup|liminf|frac\s*\{d\}|det)(?![a-z])")
_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|lg|exp)h?(?![a-z])")
_COUNTED = re.compile(r"\\(?:frac|sqrt)(?![a-z])|[-+^|!]")


def too_large(text: str) -> str | None:
    """Why the unified ``text`` is refused by every stage, as half a sentence; ``None`` where it is not."""
    if len(text) > MAX_CHARS:
        return f"has {len(text)} characters, more than {MAX_CHARS}"
    if (depth := _nesting(text)) > MAX_NESTING:
        return f"is nested {depth} deep, more than {MAX_NESTING}"
    if (digits := sum(map(str.isdecimal, text))) > MAX_DIGITS and max(map(len, _DIGIT_RUN.findall(text))) > MAX_DIGITS:
        return f"has {digits} digits, more than {MAX_DIGITS}"
    if (listed := text.count(",") + text.count(";")) > MAX_SEPARATORS:
        return f"lists {listed + 1} values, more than {MAX_SEPARATORS + 1}"
    return None


def too_hard(text: str, gold: str) -> str | None:
    """Why the unified ``text`` is refused by computer algebra, as half a sentence; ``None`` where it is not."""
    if (work := _OPEN_WORK.search(text)) and not _OPEN_WORK.search(gold):
        return f"leaves work to do ({work.group()}) where the reference is worked out"
    if len(text) > MAX_SYMBOLIC_CHARS:
        return f"has {len(text)} characters, more than {MAX_SYMBOLIC_CHARS} of an expression"
    if (cells := text.count("&")) > MAX_CELLS:
        return f"has a matrix of more than {MAX_CELLS} cells ({cells})"
    if (listed := text.count(",") + text.count(";")) > MAX_SYMBOLIC_LISTED:
        return f"lists {listed + 1} expressions, more than {MAX_SYMBOLIC_LISTED + 1}"
    if (operations := len(_COUNTED.findall(text))) > MAX_OPERATIONS:
        return f"has {operations} operations, more than {MAX_OPERATIONS}"
    if (functions := len(_FUNCTION.findall(text))) > MAX_FUNCTIONS:
        return f"has {functions} functions, more than {MAX_FUNCTIONS}"
    return _power_size(text) or _factorial_size(text) or _binomial_size(text)


def _nesting(text: str) -> int:
    depth = deepest = 0
    for bracket in _BRACKET.finditer(text):
        depth = depth + 1 if bracket.group()[-1] in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _argument(text: str, at: int) -> str:
    """The argument that starts at ``at``: a bracketed group without its brackets, a number, or one character."""
    if text[at : at + 1] in ("{", "("):
        depth = 0
        for bracket in _BRACKET.finditer(text, at):
            depth += 1 if bracket.group()[-1] in "([{" else -1
            if depth == 0:
                return text[at + 1 : bracket.start()]
        return text[at + 1 :]
    number = _NUMBER.match(text, at)
    return number.group() if number else text[at : at + 1]


def _size(text: str) -> float | None:
    """An upper bound of an exponent's size; ``None`` where letters leave it open, infinity beyond what is bounded."""
    text = _ROOT.sub("", _CONSTANT.sub("3", text))
    number = read_number(text)
    if number is not None:
        return float(min(abs(number.value), Fraction(10**9)))
    return None if _LETTER.search(text) else math.inf


def _power_size(text: str) -> str | None:
    text = text.replace(r"\exp", "e^")
    stacked = largest = 1.0
    for power in _POWER.finditer(text):
        exponent = _argument(text, power.end())
        size = _size(exponent)
        if size is None:
            # A tower with letters in it stays symbolic, but sympy still walks it.
            if exponent.count("^") >= 3:
                return f"is a tower of {exponent.count('^') + 1} powers"
            continue
        if base := power["base"]:
            digits = size * (max(len(base.partition(".")[0]), 1) if base[0].isdecimal() else 0.5)
            largest = max(largest, digits)
            if digits > MAX_POWER_DIGITS:
                return f"contains a power of more than {MAX_POWER_DIGITS} digits"
        elif size > MAX_SYMBOLIC_POWER:
            return f"contains a power above {MAX_SYMBOLIC_POWER} of an expression"
        elif power["group"]:
            stacked *= max(size, 1.0)
    return (
        f"stacks powers up to {stacked * largest:.0e}"
        if stacked > 1 and stacked * largest > MAX_STACKED_POWER
        else None
    )


def _factorial_size(text: str) -> str | None:
    if re.search(r"!\s*[)}]*\s*!", text):
        return "contains a factorial of a factorial"
    for factorial in _FACTORIAL.finditer(text):
        near = factorial["number"] or text[max(0, factorial.start() - NEARBY_CHARS) : factorial.start()]
        if _largest(near) > MAX_FACTORIAL or (factorial["group"] and "^" in near):
            return f"contains a factorial of more than {MAX_FACTORIAL} or of a power"
    return None


def _binomial_size(text: str) -> str | None:
    for binomial in _BINOMIAL.finditer(text):
        near = text[max(0, binomial.start() - NEARBY_CHARS) : binomial.end() + NEARBY_CHARS]
        if _largest(near) > MAX_BINOMIAL or "^" in near:
            return f"contains a binomial, gamma or zeta of more than {MAX_BINOMIAL} or of a power"
    return None


def _largest(text: str) -> float:
    runs: list[str] = _DIGIT_RUN.findall(text)
    return max([float(run) if len(run) < 300 else math.inf for run in runs], default=0.0)
