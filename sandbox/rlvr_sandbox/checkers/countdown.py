"""The Countdown game: reach the target with every given number exactly once, by ``+``, ``-``, ``*`` and brackets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlvr_sandbox.checkers.answers import last_tagged
from rlvr_sandbox.verdicts import Judgement, Verdict

MAX_CHARS = 128
MAX_DEPTH = 32

_ALLOWED = re.compile(r"[0-9+\-*() ]+")
_TOKEN = re.compile(r"[0-9]+|[+\-*()]")


class _MalformedError(ValueError):
    """The text is no expression of this game; the message says why."""


class _Parser:
    """Recursive descent over ``sum := product (± product)*``, ``product := atom (* atom)*``, ``atom := n | (sum)``."""

    def __init__(self, text: str) -> None:
        self._tokens = _TOKEN.findall(text)
        self._at = 0
        self.operands: list[int] = []

    def value(self) -> int:
        """The exact value of the whole text."""
        value = self._sum(0)
        if self._at < len(self._tokens):
            raise _MalformedError(f"unexpected {self._tokens[self._at]!r}")
        return value

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self._at += 1
        return token

    def _sum(self, depth: int) -> int:
        value = self._product(depth)
        while self._peek() in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            value += sign * self._product(depth)
        return value

    def _product(self, depth: int) -> int:
        value = self._atom(depth)
        while self._peek() == "*":
            self._take()
            value *= self._atom(depth)
        return value

    def _atom(self, depth: int) -> int:
        token = self._take()
        if token == "(":
            if depth == MAX_DEPTH:
                raise _MalformedError(f"brackets nest deeper than {MAX_DEPTH}")
            value = self._sum(depth + 1)
            if self._take() != ")":
                raise _MalformedError("a bracket is not closed")
            return value
        if not token.isdigit() or (token[0] == "0" and token != "0"):
            raise _MalformedError(f"a number was expected, not {token or 'the end'!r}")
        self.operands.append(int(token))
        return self.operands[-1]


def _evaluate(text: str) -> tuple[int, list[int]]:
    """Value and operands of the expression.

    Raises:
        _MalformedError: If ``text`` is not one.
    """
    if len(text) > MAX_CHARS:
        raise _MalformedError(f"{len(text)} characters, more than {MAX_CHARS}")
    if not _ALLOWED.fullmatch(text) or re.search(r"[0-9] +[0-9]", text):
        raise _MalformedError("not an expression of numbers, + - * and brackets")
    parser = _Parser(text)
    return parser.value(), parser.operands


def judge(response: str, spec: Mapping[str, Any]) -> Judgement:
    """Judge one response.

    Args:
        response: An infix expression and nothing else, or text whose last ``<answer>…</answer>`` holds one.
        spec: ``numbers`` (list of non-negative integers) and ``target`` (integer).

    Returns:
        ``no_answer`` when there is no well-formed expression, else ``wrong_answer`` or ``accepted``.
    """
    tagged = last_tagged(response)
    try:
        value, operands = _evaluate(response.strip() if tagged is None else tagged[1])
    except _MalformedError as error:
        return Judgement(Verdict.NO_ANSWER, str(error))
    if sorted(operands) != sorted(spec["numbers"]):
        return Judgement(Verdict.WRONG_ANSWER, f"uses {sorted(operands)} instead of {sorted(spec['numbers'])}")
    if value != spec["target"]:
        return Judgement(Verdict.WRONG_ANSWER, f"equals {value} instead of {spec['target']}")
    return Judgement(Verdict.ACCEPTED)
