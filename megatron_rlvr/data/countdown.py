"""Closed Countdown with three digits: the task of the embedded example, small enough to be enumerated whole.

A problem is three digits 1-9 (repeats allowed) and a target 1-99. An answer is an infix expression over ``+ - *`` that
uses every digit exactly once and equals the target; intermediate values may be any integer. Most problems have several
answers, which is what makes the policy's diversity visible.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from megatron_rlvr.core import Prompt

Split = Literal["train", "heldout"]

DIGITS = range(1, 10)
TARGETS = range(1, 100)
OPERATORS = "+-*"
HELD_OUT_PERCENT = 10


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """Three digits in ascending order and the value to reach with them.

    Attributes:
        numbers: The multiset of digits, ascending.
        target: Value of a right answer, 1 to 99.
    """

    numbers: tuple[int, int, int]
    target: int

    @property
    def text(self) -> str:
        """The prompt, ``259:07;`` for (2, 5, 9) and 7; always seven characters, so that batches need no padding."""
        return f"{''.join(map(str, self.numbers))}:{self.target:02d};"

    @property
    def split(self) -> Split:
        """The side that a SHA-256 hash of numbers and target puts this problem on, in any process and version."""
        digest = hashlib.sha256(self.text.encode()).digest()
        return "heldout" if int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT else "train"

    def as_prompt(self) -> Prompt:
        """This problem as a prompt of kind ``countdown`` with spec ``{"numbers": [...], "target": ...}``."""
        spec = {"numbers": list(self.numbers), "target": self.target}
        return Prompt(id=f"countdown-{self.text[:-1]}", text=self.text, kind="countdown", spec=spec)


@functools.cache
def solutions() -> Mapping[Problem, tuple[str, ...]]:
    """Every solvable problem, ascending, with all its answers (sorted, parentheses only where they are needed)."""
    found: dict[Problem, set[str]] = {}
    digits = itertools.product(DIGITS, repeat=3)
    for (a, b, c), first, second, left in itertools.product(digits, OPERATORS, OPERATORS, (True, False)):
        text, value = _expression((a, b, c), first, second, left)
        if value in TARGETS:
            found.setdefault(_problem((a, b, c), value), set()).add(text)
    return MappingProxyType({problem: tuple(sorted(found[problem])) for problem in sorted(found)})


def problems(split: Split) -> list[Problem]:
    """The solvable problems of one side of the split, ascending; the two sides are disjoint and cover everything."""
    return [problem for problem in solutions() if problem.split == split]


def draw_answer(rng: random.Random, split: Split = "train") -> tuple[Problem, str]:
    """Draw a problem of ``split`` together with one right answer, by forward construction.

    Digits, operators and tree shape are uniform and independent, and the draw is repeated until the value is a target
    on the wanted side. Problems with many trees therefore come more often, and an answer that two trees share (such as
    ``2+5+9``) is twice as likely as one that a single tree makes.
    """
    while True:
        digits = (rng.choice(DIGITS), rng.choice(DIGITS), rng.choice(DIGITS))
        left = rng.random() < 0.5
        text, value = _expression(digits, rng.choice(OPERATORS), rng.choice(OPERATORS), left)
        if value in TARGETS and (problem := _problem(digits, value)).split == split:
            return problem, text


def _problem(digits: tuple[int, int, int], target: int) -> Problem:
    low, middle, high = sorted(digits)
    return Problem((low, middle, high), target)


def _expression(digits: tuple[int, int, int], first: str, second: str, left: bool) -> tuple[str, int]:
    """Text and value of ``(a first b) second c`` when ``left``, else of ``a first (b second c)``."""
    a, b, c = digits
    if left:
        inner = f"({a}{first}{b})" if second == "*" and first != "*" else f"{a}{first}{b}"
        return f"{inner}{second}{c}", _apply(second, _apply(first, a, b), c)
    # a+(b-c) reads the same without parentheses; a-(b+c) and a*(b+c) do not.
    inner = f"({b}{second}{c})" if first != "+" and second != "*" else f"{b}{second}{c}"
    return f"{a}{first}{inner}", _apply(first, a, _apply(second, b, c))


def _apply(operator: str, a: int, b: int) -> int:
    if operator == "+":
        return a + b
    return a - b if operator == "-" else a * b
