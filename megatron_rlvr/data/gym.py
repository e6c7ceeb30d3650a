"""Prompts from the procedural datasets of reasoning-gym, by name."""

from __future__ import annotations

import difflib
import importlib
import json
from typing import Any
from urllib.parse import parse_qsl

from megatron_rlvr.core import Prompt, RLVRError
from megatron_rlvr.data.rows import ChatTemplate, is_json

PREFIX = "reasoning_gym:"
INSTRUCTION = "Write the final answer between <answer> and </answer>."
DEFAULT_SIZE = 500


def gym_prompts(source: str, chat_template: ChatTemplate | None) -> list[Prompt]:
    """The prompts of ``reasoning_gym:NAME?size=500&seed=0&chat=false&SETTING=VALUE``.

    Everything behind ``?`` may be left out. ``chat=true`` passes each question through the chat template. Every other
    setting goes to the dataset, as JSON where it reads as JSON and as text where it does not. The same source gives the
    same prompts everywhere; they are of kind ``reasoning_gym`` and hold the entry that the dataset scores with.

    Raises:
        RLVRError: If reasoning-gym is not installed, has no such dataset, or refuses the settings.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    settings = {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    size, seed, chat = settings.pop("size", DEFAULT_SIZE), settings.pop("seed", 0), settings.pop("chat", False)
    for key, value, low in (("size", size, 1), ("seed", seed, 0)):
        if type(value) is not int or value < low:
            raise RLVRError(f"{source!r}: {key} is {value!r}; make it a whole number of at least {low}")
    if not isinstance(chat, bool) or (chat and chat_template is None):
        raise RLVRError(
            f"{source!r}: chat is {chat!r}; make it false, or true with a tokenizer that has a chat template"
        )
    dataset = _dataset(source, name, {**settings, "size": size, "seed": seed})
    return [
        _prompt(source, f"{name}-{seed}-{index}", dataset[index], name, settings, chat_template if chat else None)
        for index in range(size)
    ]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _dataset(source: str, name: str, settings: dict[str, Any]) -> Any:
    try:
        gym: Any = importlib.import_module("reasoning_gym")
        names: Any = importlib.import_module("reasoning_gym.factory").DATASETS
    except ImportError as error:
        raise RLVRError(f"{source!r} needs reasoning-gym, which is not installed; pip install reasoning-gym") from error
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "see its gallery for the names"
        raise RLVRError(f"{source!r}: reasoning-gym has no dataset {name!r}; {hint}")
    try:
        return gym.create_dataset(name, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise RLVRError(
            f"{source!r}: dataset {name!r} refuses its settings ({error}); mend what stands behind '?'"
        ) from error


def _prompt(
    source: str,
    identifier: str,
    entry: dict[str, Any],
    name: str,
    settings: dict[str, Any],
    chat_template: ChatTemplate | None,
) -> Prompt:
    if not is_json(entry["metadata"]):
        raise RLVRError(
            f"{source!r}: entry {identifier} cannot be written as JSON for the verifier; use another dataset"
        )
    text = f"{entry['question'].rstrip()}\n{INSTRUCTION}\n"
    if chat_template is not None:
        text = chat_template([{"role": "user", "content": text.rstrip()}])
    # Through JSON once, so that a prompt compares equal to itself after a round trip (tuples become lists).
    kept = json.loads(json.dumps({"answer": entry["answer"], "metadata": entry["metadata"]}))
    return Prompt(identifier, text, "reasoning_gym", {"dataset": name, "entry": kept, "config": settings})
