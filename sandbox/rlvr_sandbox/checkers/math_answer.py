"""Mathematical answers: string equality where it suffices, math-verify (Kydlíček, 2024) for the rest.

math-verify's own timeouts are SIGALRM handlers, which cannot stop C code and disturb the process they run in. They are
off here: whoever calls this module must be able to kill the process.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

from math_verify import parse, verify  # type: ignore[import-untyped]

from rlvr_sandbox.checkers.answers import last_marked
from rlvr_sandbox.verdicts import Judgement, Verdict

MAX_ANSWER_CHARS = 2_000
UNMARKED_TAIL_CHARS = 2_000

_NOISE = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;:]|\$")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
_WORDS = re.compile(r"[a-z]{3,}|[a-z]+( [a-z]+)+", re.IGNORECASE)
_SPRAY = re.compile(
    r"[,;|&\u2228\u2227\u00b1\u2261]|\\\\|\b(?:or|and)\b|(?<=\d)\s+(?=\d)"
    r"|\\(?:lor|land|vee|wedge|pm|mp|cup|q?quad|equiv)(?![a-z])",
    re.IGNORECASE,
)
_NAME = re.compile(r"\\?[A-Za-z]+'?(_\{?\w+\}?)?(\([^()]*\))?")

# parse warns about its missing timeout and logs every failed parse; neither is news here.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def _normalise(text: str) -> str:
    """One spelling for answers that differ in typography only."""
    text = _NOISE.sub("", text.replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    text = re.sub(r"\s+", " ", _TEXT.sub(r" \1 ", text)).strip().removesuffix(".")
    text = re.sub(r"(?<!\w) | (?!\w)", "", text)
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _lists(text: str) -> bool:
    return _SPRAY.search(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)) is not None


def _names_several(answer: str, gold: str) -> bool:
    """Whether ``answer`` hedges where ``gold`` commits: it lists values, or chains more equations."""
    if "=" in gold and answer.count("=") > gold.count("="):
        return True
    return _lists(answer) and not _lists(gold)


def _sides(answer: str) -> list[str]:
    """The sides of an equation chain without a leading name: ``x = 4 + 1 = 5`` claims both ``4 + 1`` and ``5``."""
    sides = [side.strip() for side in answer.split("=")]
    return sides[1:] if len(sides) > 1 and _NAME.fullmatch(sides[0]) else sides


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> list[Any]:
    parsed: list[Any] = parse(f"\\boxed{{{text}}}", parsing_timeout=None)
    return parsed


@functools.lru_cache(maxsize=4096)
def _judge_answer(answer: str, gold: str) -> Judgement:
    """Judge an extracted answer; cached, since the samples of one prompt repeat one another."""
    plain, plain_gold = _normalise(answer), _normalise(gold)
    if not plain:
        return Judgement(Verdict.NO_ANSWER, "the answer is empty")
    if plain == plain_gold:
        return Judgement(Verdict.ACCEPTED)
    if _WORDS.fullmatch(plain_gold):
        # math-verify reads a word as the product of its letters, which would accept anagrams.
        same = plain.casefold() == plain_gold.casefold()
        return Judgement(Verdict.ACCEPTED if same else Verdict.WRONG_ANSWER)
    if _names_several(plain, plain_gold):
        return Judgement(Verdict.WRONG_ANSWER, "the answer names several values")
    # math-verify compares one side of a chain only, which would accept 1 = 2 = 5 for 5.
    sides = [answer] if "=" in gold or _lists(plain_gold) else _sides(answer.strip().removesuffix("."))
    equal = all(verify(_parsed(gold), _parsed(side), timeout_seconds=None) for side in sides)
    return Judgement(Verdict.ACCEPTED if equal else Verdict.WRONG_ANSWER)


def judge(response: str, spec: Mapping[str, Any]) -> Judgement:
    r"""Judge one response. May run for ever or exhaust memory on hostile answers.

    Args:
        response: Text whose last ``\boxed{…}`` or ``<answer>…</answer>`` is its answer; without one, what math-verify
            finds in the last 2,000 characters is.
        spec: ``answer``, the reference answer as text or LaTeX.

    Returns:
        ``no_answer`` when no answer is found, else ``wrong_answer`` or ``accepted``.
    """
    answer = last_marked(response)
    if answer is None:
        found = [part for part in parse(response[-UNMARKED_TAIL_CHARS:], parsing_timeout=None) if isinstance(part, str)]
        answer = found[-1] if found else None
    if answer is None:
        return Judgement(Verdict.NO_ANSWER, "no answer found")
    if len(answer) > MAX_ANSWER_CHARS:
        return Judgement(Verdict.WRONG_ANSWER, f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARS}")
    return _judge_answer(answer, spec["answer"])
