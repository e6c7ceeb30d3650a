"""The door for prompts: what it reads, and the one sentence it refuses everything else with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.core import Prompt, RLVRError
from megatron_rlvr.data import open_prompts

GOOD = {"prompt": "1+1=", "answer": "2"}
CHAT = [{"role": "user", "content": "1+1="}]


def write(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def test_reads_every_kind_of_row(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        GOOD,
        "",
        {"prompt": "x", "answer": 42, "id": 7},
        {"prompt": "y", "answer": 0.5, "id": None, "kind": None},
        {"prompt": "z", "spec": {"numbers": [1, 2], "target": 3}, "kind": "countdown", "id": "näme"},
    )
    assert open_prompts(source) == [
        Prompt("1", "1+1=", "math", {"answer": "2"}),
        Prompt("7", "x", "math", {"answer": "42"}),
        Prompt("4", "y", "math", {"answer": "0.5"}),
        Prompt("näme", "z", "countdown", {"numbers": [1, 2], "target": 3}),
    ]


def test_chat_messages_go_through_the_template(tmp_path: Path) -> None:
    source = write(tmp_path, {"prompt": CHAT, "answer": "2"}, GOOD)
    prompts = open_prompts(source, chat_template=lambda messages: f"<{messages[0]['role']}>{messages[0]['content']}")
    assert [prompt.text for prompt in prompts] == ["<user>1+1=", "1+1="]


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_prompts("~/rows.jsonl")) == 1


BAD_ROWS: list[tuple[object, str]] = [
    ('{"prompt": "x", "answer": ', "not a JSON object in UTF-8"),
    ("[" * 100_000, "not a JSON object in UTF-8"),
    ('{"prompt": "x", "answer": NaN}', "key 'answer' must be text or a finite number, not nan"),
    (
        [1],
        "must be an object with the keys prompt, answer, tests, reasoning_gym, spec, entry_point, kind, id, not [1]",
    ),
    ({"promt": "x", "answer": "2"}, "unknown key 'promt'; did you mean 'prompt'?"),
    (GOOD | {"anwser": "2"}, "unknown key 'anwser'; did you mean 'answer'?"),
    (GOOD | {"zzz": 1}, "unknown key 'zzz'; remove it, the keys are"),
    ({"answer": "2"}, "key 'prompt' must be text or a list of chat messages, not nothing"),
    ({"prompt": "", "answer": "2"}, "key 'prompt' must be text"),
    ({"prompt": 5, "answer": "2"}, "key 'prompt' must be text"),
    ({"prompt": [], "answer": "2"}, "key 'prompt' must be text"),
    ({"prompt": CHAT, "answer": "2"}, "has no chat template"),
    ({"prompt": ["hi"], "answer": "2"}, "has the message 'hi'"),
    ({"prompt": [{"role": "user"}], "answer": "2"}, "has the message {'role': 'user'}"),
    ({"prompt": [{"role": "user", "content": 1}], "answer": "2"}, "texts role and content"),
    ({"prompt": "x"}, "and has none"),
    ({"prompt": "x", "answer": None}, "and has none"),
    (GOOD | {"spec": {"answer": "2"}}, "and has answer and spec"),
    ({"prompt": "x", "answer": True}, "key 'answer' must be text or a finite number, not True"),
    ({"prompt": "x", "answer": " "}, "key 'answer' must be"),
    ({"prompt": "x", "answer": ["a" * 200]}, "aaa..."),
    ({"prompt": "x", "spec": []}, "key 'spec' must be a JSON object"),
    ({"prompt": "x", "spec": {}}, "key 'spec' must be a JSON object"),
    ('{"prompt": "x", "spec": {"answer": Infinity}}', "key 'spec' must be a JSON object"),
    (GOOD | {"kind": 3}, "key 'kind' must be one of math, countdown, code, reasoning_gym, not 3"),
    (GOOD | {"id": 1.5}, "key 'id' must be text or a whole number, not 1.5"),
    (GOOD | {"id": True}, "key 'id' must be"),
    (GOOD | {"id": ""}, "key 'id' must be"),
    (GOOD | {"id": "1"}, "id '1' is already taken by"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    source = write(tmp_path, GOOD, row)
    with pytest.raises(RLVRError) as refusal:
        open_prompts(source)
    text = str(refusal.value)
    assert text.startswith(f"{source}, line 2: ")
    assert message in text
    assert "\n" not in text


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff", "answer": "2"}\n')
    with pytest.raises(RLVRError, match="line 2: not a JSON object in UTF-8"):
        open_prompts(str(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "countdown:test",
            "use a path ending in .jsonl or .parquet, reasoning_gym:NAME, countdown:train or countdown:heldout",
        ),
        ("countdown:held-out", "did you mean countdown:heldout"),
        ("rows.csv", "unknown prompt source 'rows.csv'"),
        ("", "unknown prompt source ''"),
        ("nowhere.jsonl", "is not a file"),
    ],
)
def test_an_unknown_source_is_refused_naming_what_exists(source: str, message: str) -> None:
    with pytest.raises(RLVRError) as refusal:
        open_prompts(source)
    assert message in str(refusal.value)
    assert "countdown:heldout" in str(refusal.value)


def test_a_folder_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(RLVRError, match="is not a file"):
        open_prompts(str(tmp_path / "folder.jsonl"))
    with pytest.raises(RLVRError, match="has no rows"):
        open_prompts(write(tmp_path, "", "  "))


def test_countdown_is_a_source() -> None:
    train, heldout = open_prompts("countdown:train"), open_prompts("countdown:heldout")
    assert (len(train), len(heldout)) == (1662, 202)
    assert len({prompt.id for prompt in train + heldout}) == 1864


def test_parquet_without_pyarrow_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(RLVRError, match="pip install pyarrow"):
        open_prompts(str(tmp_path / "rows.parquet"))


def test_parquet_reads_as_jsonl_does(tmp_path: Path) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": CHAT, "spec": {"answer": "2"}, "kind": None},
        {"prompt": CHAT * 2, "spec": {"answer": "3"}, "kind": "math"},
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    template = str
    assert open_prompts(str(path), chat_template=template) == open_prompts(
        write(tmp_path, *rows), chat_template=template
    )
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(RLVRError, match="not a readable parquet file"):
        open_prompts(str(path))
