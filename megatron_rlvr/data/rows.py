"""One row of a prompt file as a prompt: which checker judges it, with which spec, or the sentence that refuses it."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_rlvr.core import Prompt, RLVRError

ChatTemplate = Callable[[list[dict[str, str]]], str]

TRUTHS = ("answer", "tests", "reasoning_gym", "spec")
KEYS = ("prompt", *TRUTHS, "entry_point", "kind", "id")
# What a spec of each kind cannot do without. The service checks the rest of it before it judges anything.
NEEDS: dict[str, dict[str, type]] = {
    "math": {"answer": str},
    "countdown": {"numbers": list, "target": int},
    "code": {"mode": str},
    "reasoning_gym": {"dataset": str, "entry": dict},
}
KIND_OF = {"answer": "math", "tests": "code", "reasoning_gym": "reasoning_gym", "spec": "math"}
_NAMES = {str: "text", list: "a list", int: "a whole number", dict: "an object"}


def parse_row(row: object, where: str, default_id: str, chat_template: ChatTemplate | None) -> Prompt:
    """The prompt that ``row`` holds.

    Args:
        row: The parsed row.
        where: File and line, for messages.
        default_id: The id of a row without one.
        chat_template: Turns chat messages into the text that the tokenizer encodes.

    Raises:
        RLVRError: If the row is malformed.
    """
    if not isinstance(row, dict):
        raise RLVRError(f"{where}: a row must be an object with the keys {', '.join(KEYS)}, not {show(row)}")
    for key in row:
        if key not in KEYS:
            nearest = difflib.get_close_matches(str(key), KEYS, n=1)
            mend = f"did you mean {nearest[0]!r}?" if nearest else f"remove it, the keys are {', '.join(KEYS)}"
            raise RLVRError(f"{where}: unknown key {key!r}; {mend}")
    present = {key: value for key, value in row.items() if value is not None}
    identifier = present.get("id", default_id)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int) or identifier == "":
        raise RLVRError(f"{where}: key 'id' must be text or a whole number, not {show(identifier)}")
    text = _text(present.get("prompt"), where, chat_template)
    truth = _truth(present, where)
    kind = _kind(present, truth, where)
    spec = _spec(present, truth, where)
    _check_needs(spec, kind, f"{where}: key {truth!r}")
    return Prompt(id=str(identifier), text=text, kind=kind, spec=spec)


def show(value: object) -> str:
    """``value`` short enough for one sentence."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_json(value: object) -> bool:
    """Whether ``value`` can travel to the verifier service."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _text(prompt: object, where: str, chat_template: ChatTemplate | None) -> str:
    if isinstance(prompt, str) and prompt:
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise RLVRError(f"{where}: key 'prompt' must be text or a list of chat messages, not {show(prompt)}")
    for message in prompt:
        fields = message if isinstance(message, dict) else {}
        if fields.keys() != {"role", "content"} or not all(isinstance(value, str) for value in fields.values()):
            raise RLVRError(
                f"{where}: key 'prompt' has the message {show(message)}; a chat message is an object with the texts "
                "role and content"
            )
    if chat_template is None:
        raise RLVRError(
            f"{where}: key 'prompt' is a list of chat messages and the tokenizer has no chat template; use a tokenizer "
            "that has one, or make the prompt plain text"
        )
    return chat_template(prompt)


def _truth(present: Mapping[str, object], where: str) -> str:
    """The one key that says what a right response is."""
    found = [key for key in TRUTHS if key in present]
    if len(found) != 1:
        held = " and ".join(found) if found else "none"
        raise RLVRError(f"{where}: a row needs exactly one of the keys {', '.join(TRUTHS)} and has {held}; keep one")
    return found[0]


def _kind(present: Mapping[str, object], truth: str, where: str) -> str:
    kind = present.get("kind", KIND_OF[truth])
    if not isinstance(kind, str) or kind not in NEEDS:
        nearest = difflib.get_close_matches(str(kind), NEEDS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "remove it to let the other keys decide"
        raise RLVRError(f"{where}: key 'kind' must be one of {', '.join(NEEDS)}, not {show(kind)}; {hint}")
    if truth != "spec" and kind != KIND_OF[truth]:
        raise RLVRError(
            f"{where}: key 'kind' is {kind!r} and key {truth!r} makes a row of kind {KIND_OF[truth]!r}; "
            "remove 'kind', or write the whole 'spec'"
        )
    return kind


def _spec(present: Mapping[str, object], truth: str, where: str) -> Mapping[str, Any]:
    if truth == "answer":
        return {"answer": _answer(present["answer"], where)}
    if truth == "tests":
        return _code_spec(present["tests"], present.get("entry_point"), where)
    spec = present[truth]
    if not isinstance(spec, dict) or not spec or not is_json(spec):
        raise RLVRError(f"{where}: key {truth!r} must be a JSON object with at least one key, not {show(spec)}")
    return spec


def _answer(answer: object, where: str) -> str:
    is_number = type(answer) is int or (isinstance(answer, float) and math.isfinite(answer))
    if not is_number and not (isinstance(answer, str) and answer.strip()):
        raise RLVRError(f"{where}: key 'answer' must be text or a finite number, not {show(answer)}")
    return str(answer)


def _code_spec(tests: object, entry_point: object, where: str) -> Mapping[str, Any]:
    """The spec of a program: runs (``stdin``, ``stdout``), calls (``args``, ``expected``), or the code of a suite."""
    if entry_point is not None and not (isinstance(entry_point, str) and entry_point):
        raise RLVRError(f"{where}: key 'entry_point' must name the function under test, not {show(entry_point)}")
    if isinstance(tests, str) and tests.strip():
        spec: dict[str, Any] = {"mode": "split", "test_code": tests}
    elif not isinstance(tests, list) or not tests or not is_json(tests):
        raise RLVRError(f"{where}: key 'tests' must be a list with at least one test, or test code, not {show(tests)}")
    elif all(isinstance(test, dict) and test.keys() == {"stdin", "stdout"} for test in tests):
        return {"mode": "stdio", "tests": tests}
    elif all(isinstance(test, dict) and {"args", "expected"} <= test.keys() for test in tests):
        spec = {"mode": "call", "tests": tests}
    else:
        raise RLVRError(
            f"{where}: key 'tests' mixes or misses fields in {show(tests[0])}; every test is an object with stdin and "
            "stdout, or every test is one with args and expected"
        )
    if entry_point is None:
        raise RLVRError(f"{where}: key 'tests' calls a function and no row key names it; add 'entry_point'")
    return spec | {"entry_point": entry_point}


def _check_needs(spec: Mapping[str, Any], kind: str, where: str) -> None:
    for key, needed in NEEDS[kind].items():
        value = spec.get(key)
        if not isinstance(value, needed) or isinstance(value, bool):
            raise RLVRError(
                f"{where} needs {key!r} to be {_NAMES[needed]} for kind {kind!r}, not {show(value)}; add it"
            )
