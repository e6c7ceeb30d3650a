"""The one door through which prompts enter: files of rows, reasoning-gym's datasets, or the built-in Countdown task."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rlvr.core import Prompt, RLVRError
from megatron_rlvr.data import countdown
from megatron_rlvr.data.gym import PREFIX as GYM_PREFIX
from megatron_rlvr.data.gym import gym_prompts
from megatron_rlvr.data.rows import ChatTemplate, parse_row

SPLITS: dict[str, countdown.Split] = {"countdown:train": "train", "countdown:heldout": "heldout"}
EXPECTED = "a path ending in .jsonl or .parquet, reasoning_gym:NAME, countdown:train or countdown:heldout"


def open_prompts(source: str, *, chat_template: ChatTemplate | None = None) -> list[Prompt]:
    """Read every prompt of ``source``.

    A file holds one object a row. Its key ``prompt`` is text, used as it is, or a list of chat messages. What a right
    response is says exactly one of these keys:

    * ``answer``: text or a number, judged as ``math``;
    * ``tests``: judged as ``code``; a list of ``{stdin, stdout}``, or of ``{args, expected}`` with the row's key
      ``entry_point``, or test code as text (``def check(candidate)``), also with ``entry_point``;
    * ``reasoning_gym``: ``{dataset, entry, config}`` of reasoning-gym, scored by that dataset;
    * ``spec``: an object that the verifier takes as it is, for the ``kind`` named beside it (default ``math``).

    ``id`` is optional (default: the line number, from 1). A null value counts as absent; blank lines are skipped.

    Args:
        source: A path ending in ``.jsonl`` or ``.parquet`` (needs pyarrow), ``reasoning_gym:NAME?size=500&seed=0``
            (needs reasoning-gym; see ``gym_prompts``), ``countdown:train`` or ``countdown:heldout``.
        chat_template: Turns chat messages into the text that the tokenizer encodes.

    Raises:
        RLVRError: If the source is unknown, unreadable or empty, a row is malformed, or two rows share an id.
    """
    if source in SPLITS:
        return [problem.as_prompt() for problem in countdown.problems(SPLITS[source])]
    if source.startswith(GYM_PREFIX):
        return gym_prompts(source, chat_template)
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
        prompt = parse_row(row, where, str(line), chat_template)
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
