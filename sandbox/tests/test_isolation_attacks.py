from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import rlvr_sandbox
from attacks.attack import Attack
from attacks.attack_files import ATTACKS as FILES
from attacks.attack_kernel import ATTACKS as KERNEL
from attacks.attack_network import ATTACKS as NETWORK
from attacks.attack_processes import ATTACKS as PROCESSES
from attacks.attack_residue import ATTACKS as RESIDUE
from attacks.attack_resources import ATTACKS as RESOURCES
from attacks.attack_time import ATTACKS as TIME

ATTACKS = (*FILES, *PROCESSES, *KERNEL, *NETWORK, *RESOURCES, *TIME, *RESIDUE)
SYSTEM_PYTHON = "/usr/bin/python3"
UNPRIVILEGED = 61_000


class Runner:
    """A service under some user that runs attacks on one backend."""

    def __init__(self, backend: str, python: str, ordinary: bool, home: Path) -> None:
        user = {"user": UNPRIVILEGED, "group": UNPRIVILEGED, "extra_groups": []} if ordinary else {}
        self.backend = backend
        self._process = subprocess.Popen(
            [python, "-B", "-P", str(home / "attack_runner.py"), backend],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/",
            env={"PYTHONPATH": str(home), "PATH": "/usr/bin:/bin"}, **user,
        )  # fmt: skip
        self.hello = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        assert line, f"the runner ended with {self._process.wait()}"
        return json.loads(line)

    def run(self, attack: Attack) -> dict[str, Any]:
        order = {
            "source": attack.source,
            "then": attack.then,
            "language": attack.language,
            "limits": asdict(attack.limits),
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        try:
            assert self._process.wait(20) == 0
        finally:
            self._process.kill()


@pytest.fixture(scope="module")
def readable_copy() -> Iterator[Path]:
    """The package where every user can read it, for this checkout may lie under a closed home."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="rlvr-copy-") as name:
        home = Path(name)
        package = Path(rlvr_sandbox.__file__).parent
        shutil.copytree(package, home / "rlvr_sandbox", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(Path(__file__).parent / "attacks" / "attack_runner.py", home)
        for path in (home, *home.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield home


@pytest.fixture(scope="module", params=["ns-root", "ns-user", "landlock-user", "bwrap-root", "bwrap-user"])
def runner(request: pytest.FixtureRequest, readable_copy: Path) -> Iterator[Runner]:
    yield from _serve(*request.param.split("-"), readable_copy)


@pytest.fixture(scope="module")
def landlock_as_root(readable_copy: Path) -> Iterator[Runner]:
    yield from _serve("landlock", "root", readable_copy)


def _serve(backend: str, user: str, home: Path) -> Iterator[Runner]:
    if user == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    python = sys.executable
    if (backend, user) != ("ns", "root"):
        # As root, ns builds its tree before it maps ids; all others need an interpreter that every user can reach.
        python = SYSTEM_PYTHON
        if not _recent_enough(python):
            pytest.skip(f"needs {python} 3.11 or later, which every user can reach")
    service = Runner(backend, python, user == "user" and os.geteuid() == 0, home)
    yield service
    service.close()


def _recent_enough(python: str) -> bool:
    question = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    return Path(python).exists() and subprocess.run(question, check=False).returncode == 0


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_contained(runner: Runner, attack: Attack) -> None:
    check(runner, attack)


# As root, landlock differs only in the user that programs run as.
@pytest.mark.parametrize("attack", [*FILES, *PROCESSES], ids=lambda attack: attack.name)
def test_attack_is_contained_by_landlock_as_root(landlock_as_root: Runner, attack: Attack) -> None:
    check(landlock_as_root, attack)


def check(runner: Runner, attack: Attack) -> None:
    if attack.language not in runner.hello["languages"]:
        pytest.skip(f"needs the tools of {attack.language}")
    result = runner.run(attack)
    first = result["answers"][0]
    assert first["ending"] in attack.endings, result
    assert "escaped" not in first["stdout"], result
    if attack.endings == ("exited",):
        assert first["stdout"] == "held\n", result
    if attack.then:
        assert result["answers"][1]["stdout"] == "held\n", result
    assert result["taken"] == "", result
    assert result["restarts"] == 0, result


def test_there_are_enough_different_attacks() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 60
