"""The rooms know only whom they may know (ARCHITECTURE.md), and every file keeps the house limits.

Everything is read from the syntax trees, so an import inside a function, under ``TYPE_CHECKING``, relative or through
``importlib.import_module("…")`` counts like one at the top of a file.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS, SANDBOX = "megatron_rlvr", "rlvr_sandbox"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80

# Rooms that a room may import from, besides itself. A room is a module or a package directly under megatron_rlvr.
_NOUNS = {"core", "config"}
MAY_KNOW: dict[str, set[str]] = {
    "__init__": set(),
    "core": set(),
    "config": set(),
    "vocab": set(),
    "entropy": {"core"},
    "objective": {"core", "vocab", "entropy"},
    "policy": {*_NOUNS, "vocab", "objective"},
    "rollout": _NOUNS,
    "verify": _NOUNS,
    "data": _NOUNS,
    "evaluation": {"core"},
    "report": {"core"},
}
_EVERY_ROOM_BELOW = set(MAY_KNOW)
MAY_KNOW["training"] = _EVERY_ROOM_BELOW
MAY_KNOW["cli"] = _EVERY_ROOM_BELOW | {"training"}
MAY_KNOW["__main__"] = {"cli"}

# Packages of others that these rooms may import, besides the standard library; the rest may import any.
MAY_USE: dict[str, set[str]] = {"core": {"torch"}, "config": {"omegaconf", "yaml"}, "vocab": {"torch", "triton"}}
# Never, whatever the tables above say: room, or "sandbox", to prefixes of dotted names.
NEVER: dict[str, set[str]] = {"core": {"torch.distributed"}, "sandbox": {OURS, "torch"}}


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a module inside ``package`` imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                parents = ".".join([*base, *([module] if module else [])])
                yield from ((node.lineno, f"{parents}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield node.lineno, "torch.distributed"


def room_of(name: str) -> str:
    """The room of a dotted name under megatron_rlvr; ``__init__`` for the package and what it defines itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_KNOW else "__init__"


def below(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(where: str, source: str, package: str) -> list[str]:
    """One sentence for each import in ``source``, a module of ``package``, that its room must not have."""
    room = room_of(f"{package}.{Path(where).stem}") if below(package, {OURS}) else "sandbox"
    found = []
    for line, name in sorted(set(imported(ast.parse(source), package))):
        top = name.split(".")[0]
        if below(name, NEVER.get(room, set())):
            allowed = "anything but " + ", ".join(sorted(NEVER[room]))
        elif top == OURS and room != "sandbox":
            if room_of(name) in {room, "__init__"} | MAY_KNOW[room]:
                continue
            allowed = ", ".join(sorted(MAY_KNOW[room])) or "none of ours"
        elif top == SANDBOX and room != "sandbox":
            allowed = "the sandbox's HTTP interface only"
        elif room in MAY_USE and top not in MAY_USE[room] | sys.stdlib_module_names:
            allowed = ", ".join(sorted(MAY_USE[room])) + " and the standard library"
        else:
            continue
        found.append(f"{where}:{line} imports {name}, allowed are {allowed}")
    return found


def overlong(where: str, source: str) -> list[str]:
    """One sentence for each limit of length that ``source`` breaks."""
    lines = source.count("\n")
    found = [f"{where} has {lines} lines, allowed are {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{where}:{node.lineno} {node.name} has {lines} lines, allowed are {MAX_FUNCTION_LINES}")
    return found


def python_files(*folders: str) -> list[Path]:
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert found, f"there is no Python file under {', '.join(folders)}"
    return found


def rooms_on_disk() -> set[str]:
    package = ROOT / OURS
    modules = {path.stem for path in package.glob("*.py")}
    return modules | {path.name for path in package.iterdir() if path.is_dir() and any(path.rglob("*.py"))}


def test_every_room_has_its_rule():
    missing, stale = rooms_on_disk() - MAY_KNOW.keys(), MAY_KNOW.keys() - rooms_on_disk()
    assert not missing, f"rooms without a rule: {sorted(missing)}; say in MAY_KNOW of {__file__} whom they may know"
    assert not stale, f"rules without a room: {sorted(stale)}; remove them from MAY_KNOW of {__file__}"


def test_rooms_import_only_whom_they_may_know():
    found = []
    for path in python_files(OURS, f"sandbox/{SANDBOX}", "sandbox/tests"):
        parent = path.parent.relative_to(ROOT if OURS in path.parts else ROOT / "sandbox")
        found += violations(str(path.relative_to(ROOT)), path.read_text(), ".".join(parent.parts))
    assert not found, "\n" + "\n".join(found)


def test_files_and_functions_keep_the_house_limits():
    found = []
    for path in python_files(OURS, f"sandbox/{SANDBOX}", "sandbox/tests", "tests", "examples", "benchmarks"):
        found += overlong(str(path.relative_to(ROOT)), path.read_text())
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("place", "source", "named"),
    [
        ("vocab", "import megatron_rlvr.core", "megatron_rlvr.core, allowed are none of ours"),
        ("vocab", "import numpy as np", "numpy, allowed are torch, triton and the standard library"),
        ("core", "from torch import distributed", "torch.distributed, allowed are anything but torch.distributed"),
        ("core", "import torch\nx = torch.distributed", "torch.distributed, allowed are anything but"),
        ("config", "def f():\n    import torch", "torch, allowed are omegaconf, yaml and the standard library"),
        ("entropy", "from megatron_rlvr import core, vocab", "megatron_rlvr.vocab, allowed are core"),
        ("data", "from ..policy import parallel", "megatron_rlvr.policy.parallel, allowed are config, core"),
        ("data", "from .. import rollout", "megatron_rlvr.rollout, allowed are config, core"),
        ("report", "import importlib\nimportlib.import_module('megatron_rlvr.training')", "megatron_rlvr.training, "),
        ("policy", "if TYPE_CHECKING:\n    from megatron_rlvr.rollout.engine import Engine", "rollout.engine.Engine, "),
        ("evaluation", "from megatron_rlvr.report.records import read_records", "report.records.read_records, "),
        ("training", "from megatron_rlvr import cli", "megatron_rlvr.cli, allowed are __init__, config, core"),
        ("verify", "import rlvr_sandbox", "rlvr_sandbox, allowed are the sandbox's HTTP interface only"),
        ("sandbox", "from megatron_rlvr.core import Verdict", "core.Verdict, allowed are anything but megatron_rlvr"),
        ("sandbox", "import torch.nn", "torch.nn, allowed are anything but megatron_rlvr, torch"),
    ],
)
def test_a_forbidden_import_is_found(place: str, source: str, named: str):
    package = SANDBOX if place == "sandbox" else OURS if place in ("core", "config") else f"{OURS}.{place}"
    where = f"{place}.py" if place in ("core", "config") else f"{place}/module.py"
    line = source.count("\n") + 1
    [sentence] = violations(where, source, package)
    assert sentence.startswith(f"{where}:{line} imports ")
    assert named in sentence


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("megatron_rlvr.training", "from megatron_rlvr import __version__, config\nfrom . import phases\nimport numpy"),
        ("megatron_rlvr.vocab", "from megatron_rlvr.vocab.state import merge\nimport torch.distributed, math"),
        ("megatron_rlvr.policy", "import torchvision\nfrom ..core import RLVRError"),
        ("rlvr_sandbox.checkers", "from rlvr_sandbox import verdicts\nimport math_verify"),
    ],
)
def test_an_allowed_import_is_not(package: str, source: str):
    assert violations("module.py", source, package) == []


def test_a_length_over_the_limit_is_found():
    function = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert overlong("a.py", function) == [f"a.py:1 f has {MAX_FUNCTION_LINES + 1} lines, allowed are 80"]
    assert overlong("a.py", "x = 1\n" * MAX_FILE_LINES) == []
    assert overlong("a.py", "x = 1\n" * (MAX_FILE_LINES + 1)) == ["a.py has 501 lines, allowed are 500"]


def loads(module: str, other: str) -> bool:
    """Whether importing ``module`` in a fresh interpreter also imports ``other``."""
    script = f"import sys, {module}; print({other!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() == "True"


@pytest.mark.parametrize("module", ["megatron_rlvr.config", "megatron_rlvr.cli"])
def test_a_configuration_is_read_without_torch(module: str):
    assert loads(module, "omegaconf"), "the check cannot see what a module imports"
    assert not loads(module, "torch"), f"importing {module} imports torch"
