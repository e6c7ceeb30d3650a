"""Rows and datasets of every kind: what a row's keys make of it, and the sentence that refuses the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.core import Prompt, RLVRError
from megatron_rlvr.data import open_prompts

RUNS = [{"stdin": "1 2\n", "stdout": "3\n"}]
CALLS = [{"args": [1, 2], "expected": 3}, {"args": [], "kwargs": {"a": 1}, "expected": 1}]
SUITE = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
ENTRY = {"answer": "cba", "metadata": {"word": "abc"}}
TASK = {"dataset": "spell_backward", "entry": ENTRY}


def write(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "kind", "spec"),
    [
        ({"answer": "2"}, "math", {"answer": "2"}),
        ({"spec": {"answer": "50%", "percent": "ignore"}}, "math", {"answer": "50%", "percent": "ignore"}),
        ({"spec": {"numbers": [1], "target": 1}, "kind": "countdown"}, "countdown", {"numbers": [1], "target": 1}),
        ({"tests": RUNS}, "code", {"mode": "stdio", "tests": RUNS}),
        ({"tests": CALLS, "entry_point": "add"}, "code", {"mode": "call", "tests": CALLS, "entry_point": "add"}),
        ({"tests": SUITE, "entry_point": "add"}, "code", {"mode": "split", "test_code": SUITE, "entry_point": "add"}),
        ({"spec": {"mode": "stdio", "tests": RUNS}, "kind": "code"}, "code", {"mode": "stdio", "tests": RUNS}),
        ({"reasoning_gym": TASK}, "reasoning_gym", TASK),
        ({"spec": TASK, "kind": "reasoning_gym"}, "reasoning_gym", TASK),
    ],
)
def test_a_row_becomes_a_prompt_of_its_kind(tmp_path: Path, row: dict[str, Any], kind: str, spec: object) -> None:
    assert open_prompts(write(tmp_path, {"prompt": "p", **row})) == [Prompt("1", "p", kind, spec)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "needs exactly one of the keys answer, tests, reasoning_gym, spec and has none"),
        ({"answer": "2", "tests": RUNS}, "has answer and tests; keep one"),
        ({"answer": "2", "kind": "code"}, "key 'kind' is 'code' and key 'answer' makes a row of kind 'math'"),
        ({"answer": "2", "kind": "maths"}, "did you mean 'math'?"),
        ({"tests": []}, "key 'tests' must be a list with at least one test, or test code, not []"),
        ({"tests": [{"stdin": "1"}]}, "key 'tests' mixes or misses fields in {'stdin': '1'}"),
        ({"tests": [*RUNS, *CALLS]}, "key 'tests' mixes or misses fields"),
        ({"tests": CALLS}, "add 'entry_point'"),
        ({"tests": SUITE}, "add 'entry_point'"),
        ({"tests": CALLS, "entry_point": 3}, "key 'entry_point' must name the function"),
        ({"spec": {"answer": 3}}, "key 'spec' needs 'answer' to be text for kind 'math', not 3; add it"),
        ({"spec": {"numbers": [1]}, "kind": "countdown"}, "needs 'target' to be a whole number"),
        ({"spec": {"numbers": [1], "target": True}, "kind": "countdown"}, "needs 'target' to be a whole number"),
        ({"spec": {"tests": RUNS}, "kind": "code"}, "needs 'mode' to be text for kind 'code', not nothing"),
        ({"reasoning_gym": {"dataset": "x"}}, "key 'reasoning_gym' needs 'entry' to be an object"),
        ({"reasoning_gym": "spell_backward"}, "key 'reasoning_gym' must be a JSON object"),
    ],
)
def test_other_rows_are_refused_with_file_line_key_and_mend(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    source = write(tmp_path, {"prompt": "p", "answer": "1"}, {"prompt": "p", **row})
    with pytest.raises(RLVRError) as refusal:
        open_prompts(source)
    assert str(refusal.value).startswith(f"{source}, line 2: ")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def gym() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")


def test_a_dataset_of_reasoning_gym_is_a_source() -> None:
    gym()
    source = "reasoning_gym:spell_backward?size=5&seed=3&min_word_len=4"
    prompts = open_prompts(source)
    assert prompts == open_prompts(source) != open_prompts(source.replace("seed=3", "seed=4"))
    assert [prompt.id for prompt in prompts] == [f"spell_backward-3-{index}" for index in range(5)]
    for prompt in prompts:
        assert prompt.kind == "reasoning_gym"
        assert prompt.text.endswith("between <answer> and </answer>.\n")
        assert prompt.spec["dataset"] == "spell_backward"
        assert prompt.spec["config"] == {"min_word_len": 4}
        assert prompt.spec["entry"]["answer"] == prompt.spec["entry"]["metadata"]["word"][::-1]
        assert prompt.spec["entry"]["answer"] not in prompt.text
        assert json.loads(json.dumps(prompt.spec)) == prompt.spec


def test_questions_go_through_the_chat_template_where_asked() -> None:
    gym()
    source = "reasoning_gym:leg_counting?size=2&chat=true"
    prompts = open_prompts(source, chat_template=lambda messages: f"<{messages[0]['role']}>{messages[0]['content']}")
    assert all(prompt.text.startswith("<user>") and prompt.text.endswith("</answer>.") for prompt in prompts)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym:spell_backwards", "did you mean spell_backward?"),
        ("reasoning_gym:", "has no dataset ''"),
        ("reasoning_gym:spell_backward?size=0", "size is 0; make it a whole number of at least 1"),
        ("reasoning_gym:spell_backward?seed=x", "seed is 'x'"),
        ("reasoning_gym:spell_backward?chat=true", "chat is True"),
        ("reasoning_gym:spell_backward?no_such=1", "refuses its settings"),
        ("reasoning_gym:spell_backward?min_word_len=-4", "refuses its settings"),
    ],
)
def test_a_bad_dataset_is_refused_naming_what_to_mend(source: str, message: str) -> None:
    gym()
    with pytest.raises(RLVRError) as refusal:
        open_prompts(source)
    assert message in str(refusal.value)
    assert source in str(refusal.value)


def test_without_reasoning_gym_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(RLVRError, match="pip install reasoning-gym"):
        open_prompts("reasoning_gym:spell_backward")
