"""Records of a run as JSON lines: one object per step or evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one object to a JSON-lines file."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; empty if there is none. A last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    # what follows the last newline is empty, or was being written when the run was killed
    return [json.loads(line) for line in lines[:-1]]
