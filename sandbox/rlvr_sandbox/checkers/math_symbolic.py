r"""Equality by computer algebra: math-verify (Kydlíček, 2024) between guards that it does not have.

Constants are compared by value to as many digits as the texts have and 30 more, relative to their size; ``i`` is the
imaginary unit where nothing else is a letter. Decimals are exact rationals, not floats rounded to six places. What is
left goes to math-verify. Its own timeouts are SIGALRM handlers, which cannot stop C code and disturb the process they
run in; they are off here, so whoever calls this module must be able to kill the process.
"""

from __future__ import annotations

import functools
import logging
import math
from fractions import Fraction
from typing import Any

import sympy  # type: ignore[import-untyped]
from math_verify import parse, verify  # type: ignore[import-untyped]

from rlvr_sandbox.checkers.math_values import Policy

GUARD_DIGITS = 30
DEFAULT_ROUNDING = 6
MAX_EXTRACTED_CHARS = 2_000

# What sympy raises on text that a policy made up.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)

# parse warns about its missing timeout and logs every failed parse; neither is news here.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple[Any, ...]:
    return tuple(parse(f"\\boxed{{{text}}}", parsing_timeout=None))


def extract(response: str) -> str | None:
    """What math-verify takes for the answer of a response that marks none; ``None`` where it finds nothing."""
    found = parse(response[-MAX_EXTRACTED_CHARS:], parsing_timeout=None)
    return next((part for part in reversed(found) if isinstance(part, str)), None)


def equal_as_read_by_math_verify(gold: str, response: str, policy: Policy) -> bool:
    """math-verify's verdict on the whole texts, with its own extraction and conventions.

    Its ``strict`` is off where the policy says that order does not matter: variables then match by position too.
    """
    rounding = DEFAULT_ROUNDING if policy.tolerance is None else _places(policy.tolerance)
    golds, answers = (parse(text, parsing_timeout=None) for text in (gold, response))
    return bool(
        verify(golds, answers, float_rounding=rounding, strict=policy.ordered is not False, timeout_seconds=None)
    )


def equal(gold: str, answer: str, policy: Policy) -> bool:
    """Whether the two unified texts are the same answer; what sympy fails on is not."""
    try:
        return _equal(gold, answer, policy)
    except _FAILURES:
        return False


def _equal(gold: str, answer: str, policy: Policy) -> bool:
    golds, answers = _parsed(gold), _parsed(answer)
    constants = _constant(golds), _constant(answers)
    if constants[0] is not None and constants[1] is not None:
        close = _close(constants[0], constants[1], policy, len(gold) + len(answer))
        if close is not None:
            return close
    if policy.tolerance is not None:
        return bool(verify(list(golds), list(answers), float_rounding=_places(policy.tolerance), timeout_seconds=None))
    exact = [[_exact(part) for part in parts] for parts in (golds, answers)]
    return bool(verify(exact[0], exact[1], timeout_seconds=None))


def _places(tolerance: float) -> int:
    return max(0, math.floor(-math.log10(tolerance)))


def _constant(parsed: tuple[Any, ...]) -> Any | None:
    """The parsed expression where it has no variables, with ``i`` as the imaginary unit; else ``None``."""
    expression = parsed[0] if parsed else None
    if not isinstance(expression, sympy.Expr) or any(symbol.name != "i" for symbol in expression.free_symbols):
        return None
    return expression.subs(dict.fromkeys(expression.free_symbols, sympy.I))


def _exact(part: Any) -> Any:
    """``part`` with its floats as the decimals they were written as."""
    if not isinstance(part, sympy.Basic | sympy.MatrixBase) or not part.has(sympy.Float):
        return part
    return part.xreplace({number: sympy.Rational(str(number)) for number in part.atoms(sympy.Float)})


def _close(gold: Any, answer: Any, policy: Policy, characters: int) -> bool | None:
    """Whether two constants are equal; ``None`` where one has no numeric value."""
    digits = GUARD_DIGITS + characters
    one, other = (_number(constant, digits) for constant in (gold, answer))
    if one is None or other is None:
        return None
    scale = max(abs(one), abs(other)) if policy.tolerance is None else abs(one)
    bound = sympy.Float(10, digits) ** -(digits - 10) if policy.tolerance is None else Fraction(policy.tolerance)
    return bool(abs(other - one) <= bound * scale)


def _number(constant: Any, digits: int) -> Any | None:
    """The value of a constant to so many digits; ``None`` where it has none."""
    real, imaginary = (_digits(part) for part in sympy.N(_exact(constant).doit(), digits).as_real_imag())
    return None if real is None or imaginary is None else real + imaginary * sympy.I


def _digits(part: Any) -> Any | None:
    if not (part.is_Float or part.is_Rational):
        return None
    # A precision of one bit is sympy's way to say that nothing is left but rounding noise.
    return sympy.Integer(0) if part.is_Float and part._prec == 1 else part
