r"""Mathematical answers, judged by a cascade from cheap and exact to expensive.

Stages, each named in what ``judge_math`` returns so that it can be counted:

``extract``   no answer: nothing in the response is marked ``\boxed{…}``, ``<answer>…</answer>`` or ``final answer is
              …``, stated after ``####`` or ``answer is``, or found by math-verify. The last mark counts; boxes that
              directly follow one another, ``\boxed{1} and \boxed{2}``, are one answer that lists both.
``limits``    refused in words: above 4,096 characters, 50 brackets deep, numbers of more than 1,000 digits.
``text``      the same text but for typography; also every reference that is a word or a choice letter.
``exact``     both sides are read exactly (``math_reading``): numbers as rationals, percentages, units, ± pairs, lists,
              tuples, sets, intervals, inequalities. Microseconds, no sympy, right in both directions.
``hedge``     the answer names several values where the reference is one.
``symbolic``  computer algebra (``math_symbolic``), after estimates of towers, factorials and the like.

Policy, per item, with the defaults first:

* numbers are equal when they are the same rational or real number: 3.14159265 is not π, 0.333 is not 1/3.
  ``tolerance: 1e-4`` accepts what is relatively closer.
* ``percent: "gold"``: ``50%`` is 1/2; where the reference has the sign, a bare 50 is right as well. So ``50%`` is wrong
  for 50. ``"value"``: a bare 50 is wrong for ``50%``. ``"ignore"``: the sign counts for nothing.
* ``units: "gold"``: metric and imperial lengths, masses, times, volumes, money and degrees count where both sides have
  one: 5 km is wrong for 5 cm, 50 mm is right. Other nouns do not count. ``"strict"``: the same unit or noun, or
  none, on both sides. ``"ignore"``: units count for nothing.
* ``ordered: null``: ``(1,2)`` is ordered, ``\{1,2\}`` is a set and not equal to it; a bare ``1, 2`` is in any order,
  but in order beside ordered brackets. Assignments ``x=1, y=2`` go by name. ``true``: order matters everywhere.
  ``false``: nowhere, and kinds of brackets make no difference. ``(1,2)`` is also the open interval, equal to ``1<x<2``.
* ``chain: "all"``: a leading name is dropped, ``x = 5``; of ``4+1 = 5`` every side must be right, so ``4 = 5`` is
  wrong. What follows ``\approx`` does not count. ``"last"``: the last side alone counts.
* ``decimal_comma: false``: ``1,5`` lists two numbers. ``true``: it may also be 1.5.
* ``evaluated: false``: arithmetic counts by its value, ``9+1`` is 10. ``true``: a reference that is a written number
  needs one. Sums, products, integrals and limits that are left to do are always wrong unless the reference has one too.
* a numeral with a base, ``10_2``, equals the same numeral only.
* ``reading: "math_verify"``: the cascade is off and math-verify's verdict on the whole texts counts; of the rest
  only ``tolerance`` (its rounding) and ``ordered: false`` (its ``strict=False``) do something.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from rlvr_sandbox.checkers import math_symbolic
from rlvr_sandbox.checkers.math_limits import too_hard, too_large
from rlvr_sandbox.checkers.math_reading import read
from rlvr_sandbox.checkers.math_scalars import unit_behind
from rlvr_sandbox.checkers.math_split import elements, equated, is_name, is_wrapped, sides
from rlvr_sandbox.checkers.math_text import (
    MAX_STATEMENT_CHARS,
    marked_answer,
    plain,
    stated_answer,
    unify,
    whole_answer,
)
from rlvr_sandbox.checkers.math_values import Policy, Quantity, same
from rlvr_sandbox.verdicts import Judgement, Verdict

MAX_CACHED = 16_384
MAX_RAW_ANSWER_CHARS = 8_192

_WORDS = re.compile(r"[a-z]{3,}|[a-z]+(?:[ -][a-z]+)+", re.IGNORECASE)
_CHOICE = re.compile(r"\(?([A-Z])\)?[.):]?")
_SPRAY = re.compile(
    r"[,;|&\u2228\u2227\u00b1\u2261]|\\\\|\b(?:or|and)\b|(?<=\d)\s+(?=\d)"
    r"|\\(?:lor|land|vee|wedge|pm|mp|cup|equiv)(?![a-z])",
    re.IGNORECASE,
)
_GROUPS = re.compile(r"(?<=\d)[, ](?=\d{3}(?!\d))")


class Stage(enum.StrEnum):
    """Where in the cascade an item was decided."""

    EXTRACT = "extract"
    LIMITS = "limits"
    TEXT = "text"
    EXACT = "exact"
    HEDGE = "hedge"
    SYMBOLIC = "symbolic"


Decision = tuple[Judgement, Stage]

_cache: OrderedDict[bytes, Decision] = OrderedDict()


def _decided(accepted: bool, stage: Stage, detail: str = "") -> Decision:
    return Judgement(Verdict.ACCEPTED if accepted else Verdict.WRONG_ANSWER, detail), stage


def _is_listing(text: str) -> bool:
    return _SPRAY.search(_GROUPS.sub("", text)) is not None


def _by_text(answer: str, gold: str) -> Decision | None:
    """Decide by comparing texts; ``None`` where different texts may still be the same answer."""
    answer, gold = plain(answer), plain(gold)
    if answer == gold:
        return _decided(True, Stage.TEXT)
    choices = _CHOICE.fullmatch(answer), _CHOICE.fullmatch(gold)
    if choices[0] and choices[1]:
        return _decided(choices[0][1] == choices[1][1], Stage.TEXT)
    if _WORDS.fullmatch(gold):
        # math-verify reads a word as the product of its letters, which would accept anagrams.
        return _decided(answer.casefold() == gold.casefold(), Stage.TEXT)
    return None


def _exactly(answers: list[str], gold: str, policy: Policy) -> Decision | None:
    """Decide by exact values; ``None`` where one side is not read."""
    reference = read(gold, decimal_comma=policy.decimal_comma)
    if not reference:
        return None
    claims = [read(answer, decimal_comma=policy.decimal_comma) for answer in answers]
    if not all(claims):
        literal = isinstance(reference[0], Quantity) and reference[0].literal
        return _decided(False, Stage.EXACT, "not written as a number") if policy.evaluated and literal else None
    # Of a chain the last side must be written out; the sides before it show the work.
    work = policy.with_work()
    right = all(same(reference, claim, work) for claim in claims[:-1]) and same(reference, claims[-1], policy)
    return _decided(right, Stage.EXACT)


def _symbolically(answer: str, gold: str, policy: Policy) -> Decision:
    """Decide by computer algebra."""
    if reason := too_hard(answer, gold):
        return _decided(False, Stage.LIMITS, f"the answer {reason}")
    brackets = {text[-1] for text in (answer, gold) if is_wrapped(text) and len(elements(text.strip("\\{}()[]"))) > 1}
    if policy.ordered is None and {")", "}"} <= brackets:
        return _decided(False, Stage.SYMBOLIC, "an ordered tuple is not a set")
    units = unit_behind(answer), unit_behind(gold)
    if policy.units != "ignore" and all(units) and units[0] != units[1]:
        return _decided(False, Stage.SYMBOLIC, "another unit")
    return _decided(math_symbolic.equal(gold, answer, policy), Stage.SYMBOLIC)


def _decide(answer: str, gold: str, policy: Policy) -> Decision:
    """Run the cascade on an extracted answer and reference."""
    answer, gold = unify(answer), unify(gold)
    if not plain(answer):
        return Judgement(Verdict.NO_ANSWER, "the answer is empty"), Stage.EXTRACT
    if reason := too_large(answer):
        return _decided(False, Stage.LIMITS, f"the answer {reason}")
    if decision := _by_text(answer, gold):
        return decision
    equation = len(equated(gold)) > 1 and not is_name(equated(gold)[0])
    claims = sides(answer)[-1:] if policy.chain == "last" else sides(answer)
    value = gold if equation else sides(gold)[-1]
    if not equation and (decision := _exactly(claims, value, policy)):
        return decision
    if _is_listing(plain(answer)) and not _is_listing(plain(gold)):
        return _decided(False, Stage.HEDGE, "the answer names several values")
    if "=" in gold and answer.count("=") > gold.count("=") and policy.chain == "all":
        return _decided(False, Stage.HEDGE, "the answer chains more equations than the reference")
    if "=" in gold and "=" in answer and not _is_listing(plain(gold)):
        whole = _symbolically(answer, gold, policy)
        if whole[0].verdict is Verdict.ACCEPTED or equation:
            return whole
    decisions = [
        _symbolically(claim, gold if equation else value, policy) for claim in ([answer] if equation else claims)
    ]
    return next((one for one in decisions if one[0].verdict is not Verdict.ACCEPTED), decisions[-1])


def _answer_of(response: str) -> str | None:
    for answer in (marked_answer(response), whole_answer(response)):
        if answer is not None:
            return answer
    for found in (response if len(response) <= MAX_STATEMENT_CHARS else None, stated_answer(response)):
        if found is not None and read(unify(found)):
            return found
    return math_symbolic.extract(response)


def _gold_of(gold: str) -> str:
    """The reference without its surroundings: a solution text is reduced to the answer that it marks."""
    marked = marked_answer(gold)
    return gold if marked is None else marked


def _judged(response: str, spec: Mapping[str, Any]) -> Decision:
    policy, gold = Policy.of(spec), spec["answer"]
    if policy.reading == "math_verify":
        if "\\" in gold and "$" not in gold and r"\boxed" not in gold:
            gold = f"\\boxed{{{gold}}}"
        accepted = math_symbolic.equal_as_read_by_math_verify(gold, response[-MAX_RAW_ANSWER_CHARS:], policy)
        return _decided(accepted, Stage.SYMBOLIC)
    answer = _answer_of(response)
    if answer is None:
        return Judgement(Verdict.NO_ANSWER, "no answer found"), Stage.EXTRACT
    if len(answer) > MAX_RAW_ANSWER_CHARS:
        return _decided(
            False, Stage.LIMITS, f"the answer has {len(answer)} characters, more than {MAX_RAW_ANSWER_CHARS}"
        )
    key = hashlib.blake2b(json.dumps([answer, dict(spec)], sort_keys=True).encode(), digest_size=16).digest()
    if key in _cache:
        _cache.move_to_end(key)
        return _cache[key]
    decision = _cache[key] = _decide(answer, _gold_of(gold), policy)
    if len(_cache) > MAX_CACHED:
        _cache.popitem(last=False)
    return decision


def judge_math(response: str, spec: Mapping[str, Any]) -> Decision:
    """Judge one response and say which stage decided it. May run for ever on hostile answers.

    Args:
        response: The whole response.
        spec: The fields of ``MathSpec``; all but ``answer`` may be left out.

    Returns:
        ``no_answer``, ``wrong_answer``, ``accepted``, or ``memory_limit``, with the stage.
    """
    try:
        return _judged(response, spec)
    except MemoryError:
        return Judgement(Verdict.MEMORY_LIMIT, "computer algebra ran out of memory"), Stage.SYMBOLIC


def judge(response: str, spec: Mapping[str, Any]) -> Judgement:
    """``judge_math`` as the service calls it: the stage is among the flags, as ``stage:exact``."""
    judgement, stage = judge_math(response, spec)
    return judgement._replace(flags=(f"stage:{stage}",))
