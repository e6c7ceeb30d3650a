r"""Tasks of reasoning-gym, judged by the dataset's own ``score_answer``, made safe for text that a policy wrote.

The answer is the last ``<answer>…</answer>`` or ``\boxed{…}``, else the whole response. A score of 1 is accepted; a
partial score is in the detail and earns nothing. Four things stand between the answer and the scorer:

* several scorers of reasoning-gym 0.1.25 hand the answer to ``eval`` or to sympy's ``parse_expr``, which evaluates
  Python; both are replaced here by readers of literals and of plain formulas;
* a scorer that also gives 1 to nonsense (``game_of_life_halting`` to any text) does not count: the dataset's answer
  must be given literally;
* ``puzzle24`` does not look which numbers are used; here they must be the given ones;
* scorers raise on odd text, which is a wrong answer, and print, which goes nowhere.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import json
import math
import re
import sys
import tokenize
import warnings
from collections.abc import Mapping
from typing import Any

from rlvr_sandbox.checkers.answers import boxed_spans, last_tagged
from rlvr_sandbox.verdicts import Judgement, SandboxError, Verdict

MAX_ANSWER_CHARS = 20_000
MAX_FORMULA_CHARS = 1_000
MAX_POWER = 100
MAX_SHIFT = 4_096
NONSENSE = "none of it"

_FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, SyntaxError),
    *(TypeError, ValueError, StopIteration, tokenize.TokenError),
)
_FORMULA = re.compile(r"(?:[A-Za-z]+|[0-9]{1,60}(?:\.[0-9]{0,60})?|\.[0-9]{1,60}|\*\*|[-+*/^(), \n])*")
_NAME = re.compile(r"[A-Za-z]+")
_NAMES = "sin cos tan sec csc cot asin acos atan sinh cosh tanh exp log ln sqrt pi Abs"
_FUNCTIONS = frozenset(_NAMES.split())
_DATA = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Load, ast.UnaryOp, ast.UAdd, ast.USub),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.LShift, ast.RShift, ast.BitAnd, ast.BitOr),
    *(ast.BitXor, ast.Invert, ast.Div),
)


def _literal(text: str, *_: object) -> object:
    """Stands in for ``eval``: literals and integer arithmetic, nothing with a name in it."""
    tree = ast.parse(text.strip(), mode="eval")
    nodes = list(ast.walk(tree))
    if not all(isinstance(node, _DATA) for node in nodes):
        raise ValueError("not a literal")
    if any(isinstance(node, ast.BinOp) for node in nodes):
        constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
        shifts = [node.right for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift)]
        if not all(isinstance(value, int | float) for value in constants):
            raise ValueError("arithmetic with something else than numbers")
        if not all(isinstance(shift, ast.Constant) and 0 <= _number(shift) <= MAX_SHIFT for shift in shifts):
            raise ValueError("too large a shift")
    return eval(compile(tree, "<answer>", "eval"), {"__builtins__": {}})


def _number(constant: ast.Constant) -> float:
    return float(constant.value) if isinstance(constant.value, int | float) else math.inf


def _formula(parse: Any, text: str, *arguments: object, **options: object) -> object:
    """Stands in for ``parse_expr``: numbers, one-letter names, known functions, operators."""
    names = set(_NAME.findall(text))
    if len(text) > MAX_FORMULA_CHARS or not _FORMULA.fullmatch(text):
        raise ValueError("not a formula")
    if any(len(name) > 1 and name not in _FUNCTIONS for name in names):
        raise ValueError("a name that is not allowed")
    if any(int(power) > MAX_POWER for power in re.findall(r"(?:\*\*|\^)[\s(]*([0-9]{1,60})", text)):
        raise ValueError("too large a power")
    if re.search(r"(?:\*\*|\^)[^-+*/]*(?:\*\*|\^)", text):
        raise ValueError("a tower of powers")
    return parse(text, *arguments, **options)


@functools.cache
def _datasets() -> Mapping[str, Any]:
    """reasoning-gym's registry, with the two readers in place.

    Raises:
        SandboxError: If the package is not installed.
    """
    try:
        registry: Mapping[str, Any] = importlib.import_module("reasoning_gym").factory.DATASETS
    except ImportError as error:
        raise SandboxError(
            f"reasoning-gym cannot be imported ({error}); pip install 'rlvr-sandbox[reasoning-gym]'"
        ) from error
    import sympy  # type: ignore[import-untyped]
    from sympy.parsing.sympy_parser import parse_expr  # type: ignore[import-untyped]

    formula = functools.partial(_formula, parse_expr)
    sympy.parse_expr = formula
    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym."):
            module.__dict__["eval"] = _literal
            if module.__dict__.get("parse_expr") is parse_expr:
                module.__dict__["parse_expr"] = formula
    return registry


@functools.lru_cache(maxsize=64)
def _dataset(name: str, config: str) -> Any:
    """The dataset of that name with the settings ``config`` (JSON).

    Raises:
        SandboxError: If there is no such dataset or it refuses the settings.
    """
    datasets = _datasets()
    if name not in datasets:
        raise SandboxError(f"reasoning-gym has no dataset {name!r}; use one of its {len(datasets)} names")
    dataset, settings = datasets[name]
    try:
        return dataset(config=settings(**{key: _tuples(value) for key, value in json.loads(config).items()}))
    except _FAILURES as error:
        raise SandboxError(f"dataset {name!r} refuses config {config[:80]} ({error}); use its own settings") from error


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, list):
        return tuple(_tuples(part) for part in value)
    return {key: _tuples(part) for key, part in value.items()} if isinstance(value, dict) else value


def _score(dataset: Any, answer: str, entry: Mapping[str, Any]) -> float:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            score = float(dataset.score_answer(answer, dict(entry)))
        except _FAILURES:
            return 0.0
    return score if math.isfinite(score) else 0.0


def _settled(dataset: Any, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry with lists or with tuples, whichever lets the dataset's own answer score 1."""
    if entry["answer"] is None or _score(dataset, entry["answer"], entry) >= 1:
        return entry
    return {**entry, "metadata": _tuples(entry["metadata"])}


def _answer_of(response: str) -> str:
    boxes = [(span.mark, response[span.start : span.stop].strip()) for span in boxed_spans(response)[-1:]]
    tagged = last_tagged(response)
    marks = [*boxes, tagged] if tagged else boxes
    return max(marks)[1] if marks else response.strip()


def _honest(dataset: Any, name: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """Whether a score of 1 means what it should."""
    if name == "puzzle24":
        return sorted(map(int, re.findall(r"[0-9]+", answer))) == sorted(entry["metadata"]["numbers"])
    if _score(dataset, NONSENSE, entry) >= 1:
        return entry["answer"] is not None and answer.casefold() == entry["answer"].strip().casefold()
    return True


def judge(response: str, spec: Mapping[str, Any]) -> Judgement:
    """Judge one response. May run for ever or die on hostile answers.

    Args:
        response: The whole response.
        spec: The fields of ``ReasoningGymSpec``.

    Returns:
        ``accepted``, ``wrong_answer`` or ``no_answer``; ``infra_error`` where the spec or the installation is at fault.
    """
    answer = _answer_of(response)
    if not answer:
        return Judgement(Verdict.NO_ANSWER, "the answer is empty")
    if len(answer) > MAX_ANSWER_CHARS:
        return Judgement(Verdict.WRONG_ANSWER, f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARS}")
    try:
        dataset = _dataset(spec["dataset"], json.dumps(spec.get("config") or {}, sort_keys=True))
    except SandboxError as error:
        return Judgement(Verdict.INFRA_ERROR, str(error))
    entry = _settled(dataset, {"question": "", "answer": None, "metadata": {}, **spec["entry"]})
    score = _score(dataset, answer, entry)
    if score < 1:
        return Judgement(Verdict.WRONG_ANSWER, f"score {score:g}")
    if not _honest(dataset, spec["dataset"], answer, entry):
        return Judgement(Verdict.WRONG_ANSWER, "the scorer of this dataset would accept this whatever the task says")
    return Judgement(Verdict.ACCEPTED)
