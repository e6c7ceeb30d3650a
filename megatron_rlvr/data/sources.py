"""The one door through which prompts enter: files of rows, or the built-in Countdown task."""

from __future__ import annotations

import difflib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_rlvr.core import Prompt, RLVRError
from megatron_rlvr.data import countdown

ChatTemplate = Callable[[list[dict[str, str]]], str]

KEYS = ("prompt", "answer", "spec", "kind", "id")
SPLITS: dict[str, countdown.Split] = {"countdown:train": "train", "countdown:heldout": "heldout"}
EXPECTED = "a path ending in .jsonl or .parquet, countdown:train or countdown:heldout"


def open_prompts(source: str, *, chat_template: ChatTemplate | None = None) -> list[Prompt]:
    """Read every prompt of ``source``.

    A file holds one object a row with the keys ``prompt`` (text, used as it is, or a list of chat messages), ``answer``
    (text or number, short for ``spec: {"answer": ...}``) or ``spec`` (an object), ``kind`` (default ``math``) and
    ``id`` (default: the line number, from 1). A null value counts as absent; blank lines are skipped.

    Args:
        source: A path ending in ``.jsonl`` or ``.parquet`` (needs pyarrow), ``countdown:train`` or
            ``countdown:heldout``.
        chat_template: Turns chat messages into the text that the tokenizer encodes.

    Raises:
        RLVRError: If the source is unknown, unreadable or empty, a row is malformed, or two rows share an id.
    """
    if source in SPLITS:
        return [problem.as_prompt() for problem in countdown.problems(SPLITS[source])]
    path = Path(source).expanduser()
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        nearest = difflib.get_close_matches(source, SPLITS, n=1)
        hint = f"did you mean {nearest[0]}, or else " if nearest else ""
        raise RLVRError(f"unknown prompt source {source!r}; {hint}use {EXPECTED}")
    if not path.is_file():
        raise RLVRError(f"the prompt source {source!r} is not a file; check the path, or use {EXPECTED}")
    prompts: list[Prompt] = []
    where_of: dict[str, str] = {}
    for line, row in readers[path.suffix](path):
        where = f"{path}, line {line}"
        prompt = _prompt(row, where, str(line), chat_template)
        if prompt.id in where_of:
            raise RLVRError(f"{where}: id {prompt.id!r} is already taken by {where_of[prompt.id]}; make the ids unique")
        where_of[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise RLVRError(f"the prompt source {source!r} has no rows; add at least one")
    return prompts


def _jsonl_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RLVRError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    for line, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            yield line, json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise RLVRError(f"{path}, line {line}: not a JSON object in UTF-8 ({error}); mend the line") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise RLVRError(
            f"{path} is a parquet file and pyarrow is not installed; run pip install pyarrow, or convert it to .jsonl"
        ) from error
    try:
        rows: list[object] = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RLVRError(f"{path}: not a readable parquet file ({error}); write it again") from error
    return enumerate(rows, start=1)


def _prompt(row: object, where: str, default_id: str, chat_template: ChatTemplate | None) -> Prompt:
    if not isinstance(row, dict):
        raise RLVRError(f"{where}: a row must be an object with the keys {', '.join(KEYS)}, not {_show(row)}")
    for key in row:
        if key not in KEYS:
            nearest = difflib.get_close_matches(str(key), KEYS, n=1)
            mend = f"did you mean {nearest[0]!r}?" if nearest else f"remove it, the keys are {', '.join(KEYS)}"
            raise RLVRError(f"{where}: unknown key {key!r}; {mend}")
    present = {key: value for key, value in row.items() if value is not None}
    kind = present.get("kind", "math")
    if not isinstance(kind, str) or not kind:
        raise RLVRError(f"{where}: key 'kind' must name a checker, such as math, not {_show(kind)}")
    identifier = present.get("id", default_id)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int) or identifier == "":
        raise RLVRError(f"{where}: key 'id' must be text or a whole number, not {_show(identifier)}")
    text = _text(present.get("prompt"), where, chat_template)
    return Prompt(id=str(identifier), text=text, kind=kind, spec=_spec(present, where))


def _text(prompt: object, where: str, chat_template: ChatTemplate | None) -> str:
    if isinstance(prompt, str) and prompt:
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise RLVRError(f"{where}: key 'prompt' must be text or a list of chat messages, not {_show(prompt)}")
    for message in prompt:
        fields = message if isinstance(message, dict) else {}
        if fields.keys() != {"role", "content"} or not all(isinstance(value, str) for value in fields.values()):
            raise RLVRError(
                f"{where}: key 'prompt' has the message {_show(message)}; a chat message is an object with the texts "
                "role and content"
            )
    if chat_template is None:
        raise RLVRError(
            f"{where}: key 'prompt' is a list of chat messages and the tokenizer has no chat template; use a tokenizer "
            "that has one, or make the prompt plain text"
        )
    return chat_template(prompt)


def _spec(present: Mapping[str, object], where: str) -> Mapping[str, Any]:
    if ("answer" in present) == ("spec" in present):
        found = "both" if "spec" in present else "neither"
        raise RLVRError(f"{where}: a row needs either the key 'answer' or the key 'spec' and has {found}; keep one")
    if "spec" in present:
        spec = present["spec"]
        if not isinstance(spec, dict) or not spec or not _is_json(spec):
            raise RLVRError(f"{where}: key 'spec' must be a JSON object with at least one key, not {_show(spec)}")
        return spec
    answer = present["answer"]
    is_number = type(answer) is int or (isinstance(answer, float) and math.isfinite(answer))
    if not is_number and not (isinstance(answer, str) and answer.strip()):
        raise RLVRError(f"{where}: key 'answer' must be text or a finite number, not {_show(answer)}")
    return {"answer": str(answer)}


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _show(value: object) -> str:
    """``value`` short enough for one sentence."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
