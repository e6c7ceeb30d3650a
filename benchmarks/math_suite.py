"""math-verify's own published test suite through rlvr-sandbox's math cascade, and what is judged otherwise.

    python benchmarks/math_suite.py                  # fetches the sdist of math-verify 0.9.0 from PyPI (60 kB)
    python benchmarks/math_suite.py SDIST_FOLDER     # uses an unpacked one

The suite's files are read where they lie and are not part of this repository. Every parametrised case with a reference
and a prediction is one item: the prediction is the response, the reference the spec's ``answer``.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlvr_sandbox.checkers.math_answer import judge_math

VERSION = "0.9.0"
FETCH_TIMEOUT_S = 120
# Where the cascade is stricter by intention: the setting under which the suite's verdict comes out, and the reason.
SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    (
        "chain: last",
        {"chain": "last"},
        "a false equation stands in the answer (x = 5+5+1 = 7 = 11), the last side is right",
    ),
    ("decimal_comma: true", {"decimal_comma": True}, "1,22 lists two numbers"),
    ("tolerance: 1e-6", {"tolerance": 1e-6}, "a rounded decimal is not the number"),
    ("tolerance: 0.02", {"tolerance": 0.02}, "a number rounded to two places is not the number"),
    ("ordered: false", {"ordered": False}, "an ordered pair is not a set"),
    (
        "reading: math_verify",
        {"reading": "math_verify"},
        "a list joined by plus signs; 1 - 1/e for 1 + 1/e, both cut short",
    ),
]
UNREACHABLE = "none"
_LOOSE: dict[str, Any] = {"reading": "math_verify", "ordered": False}
SETTINGS.append(("the same, ordered: false", _LOOSE, "f(y) for f(x): variables match by name"))


class Case(NamedTuple):
    """One case of the suite."""

    name: str
    gold: str
    response: str
    expected: bool


def fetch(folder: Path) -> Path | None:
    """Download and unpack the sdist below ``folder``; ``None`` where the registry cannot be reached."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "--dest", str(folder), f"math-verify=={VERSION}"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=FETCH_TIMEOUT_S)
        archive = next(folder.glob("*.tar.gz"))
    except (subprocess.SubprocessError, OSError, StopIteration):
        return None
    with tarfile.open(archive) as packed:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            packed.extraction_filter = tarfile.data_filter
        packed.extractall(folder)
    return next(folder.glob("math_verify-*/"))


def cases(sdist: Path) -> Iterator[Case]:
    """Every case with a reference and a prediction."""
    sys.path.insert(0, str(sdist))
    try:
        for path in sorted((sdist / "tests").glob("test_*.py")):
            module = importlib.import_module(f"tests.{path.stem}")
            yield from _cases_of(path.stem, module)
    finally:
        sys.path.remove(str(sdist))
        for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.test_")]:
            del sys.modules[name]


def _cases_of(file: str, module: Any) -> Iterator[Case]:
    for name, function in vars(module).items():
        for mark in getattr(function, "pytestmark", ()):
            if not name.startswith("test") or mark.name != "parametrize":
                continue
            keys = [key.strip() for key in mark.args[0].split(",")]
            for row in mark.args[1]:
                fields = dict(zip(keys, row, strict=True))
                expected = fields.get("expected", fields.get("result"))
                if {"gold", "pred"} <= fields.keys():
                    yield Case(f"{file}::{name}", fields["gold"], fields["pred"], bool(expected))


def accepts(case: Case, **policy: Any) -> bool:
    """Whether the cascade accepts the case under ``policy``."""
    verdict: str = judge_math(case.response, {"answer": case.gold, **policy})[0].verdict
    return verdict == "accepted"


def setting_for(case: Case) -> str:
    """The first setting under which a lost case is accepted."""
    return next((name for name, policy, _ in SETTINGS if accepts(case, **policy)), UNREACHABLE)


def main() -> None:
    """Run the suite and print what differs."""
    with tempfile.TemporaryDirectory() as folder:
        sdist = Path(sys.argv[1]) if len(sys.argv) > 1 else fetch(Path(folder))
        if sdist is None:
            sys.exit(
                f"the sdist of math-verify {VERSION} cannot be fetched from the registry, so its suite was not run"
            )
        found = list(cases(sdist))
    count: Counter[tuple[bool, bool]] = Counter()
    lost: list[tuple[str, Case]] = []
    for case in found:
        accepted = accepts(case)
        count[case.expected, accepted] += 1
        if case.expected and not accepted:
            lost.append((setting_for(case), case))
        elif accepted and not case.expected:
            print(f"accepted beyond the suite: {_short(case)}")
    right = count[True, True] + count[False, False]
    print(f"{len(found)} cases: {right} as the suite expects under the defaults, {len(lost)} stricter by intention:")
    reasons = {name: reason for name, _, reason in SETTINGS}
    for setting, case in sorted(lost):
        print(f"  {setting:22} {reasons.get(setting, 'no setting')}: {_short(case)}")


def _short(case: Case) -> str:
    gold, response = (text if len(text) <= 60 else f"…{text[-60:]}" for text in (case.gold, case.response))
    return f"{case.name}: {gold!r} / {response!r}"


if __name__ == "__main__":
    main()
