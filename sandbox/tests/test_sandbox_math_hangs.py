"""Answers made to hang a checker, and math-verify's own suite; the inputs are those of ``benchmarks/``."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rlvr_sandbox.process import WorkerProcess, WorkItem

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KILL_AFTER_CPU_S = 1.5
MAX_CPU_S = 3.0
# Cases of the suite that the defaults judge otherwise, by the setting that gives the suite's verdict.
LOST = {
    "chain: last": 6,
    "decimal_comma: true": 3,
    "tolerance: 1e-6": 2,
    "tolerance: 0.02": 2,
    "ordered: false": 1,
    "reading: math_verify": 2,
    "the same, ordered: false": 1,
}


def load(name: str) -> ModuleType:
    path = BENCHMARKS / f"{name}.py"
    if not path.is_file():
        pytest.skip(f"{path} is not there: the tests run outside the repository")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


async def judge_all(responses: dict[str, str], gold: str) -> dict[str, tuple[str, float]]:
    """Verdict and CPU seconds by name; a worker that overruns is replaced, as the pool does it."""
    results: dict[str, tuple[str, float]] = {}
    worker = await WorkerProcess.spawn()
    for name, response in responses.items():
        start = worker.clock().cpu_s
        worker.send([WorkItem("math", response, {"answer": gold})])
        while name not in results:
            judgements = await worker.judgements(0.05)
            used = worker.clock().cpu_s - start
            if judgements:
                results[name] = judgements[0].verdict, used
            elif worker.ended or used > KILL_AFTER_CPU_S:
                results[name] = "died" if worker.ended else "time_limit", used
                await worker.kill()
                worker = await WorkerProcess.spawn()
    await worker.kill()
    return results


def test_no_answer_hangs_a_worker() -> None:
    inputs = load("math_inputs")
    responses = {name: rf"\boxed{{{text}}}" for name, text in inputs.HANGS.items()} | inputs.UNMARKED_HANGS
    assert len(responses) >= 34
    results = asyncio.run(judge_all(responses | {"afterwards": r"\boxed{5.0}"}, "5"))
    assert results.pop("afterwards")[0] == "accepted"
    slow = {name: result for name, result in results.items() if result[1] > MAX_CPU_S}
    assert not slow
    assert {verdict for verdict, _ in results.values()} <= {"wrong_answer", "no_answer", "time_limit"}


def test_math_verifys_own_suite(tmp_path: Path) -> None:
    suite = load("math_suite")
    given = os.environ.get("MATH_VERIFY_SDIST")
    sdist = Path(given) if given else suite.fetch(tmp_path)
    if sdist is None:
        pytest.skip("the sdist of math-verify 0.9.0 cannot be fetched; set MATH_VERIFY_SDIST to an unpacked one")
    cases = list(suite.cases(sdist))
    assert len(cases) == 275
    accepted = [suite.accepts(case) for case in cases]
    beyond = sum(yes and not case.expected for case, yes in zip(cases, accepted, strict=True))
    assert beyond <= 3
    lost = [suite.setting_for(case) for case, yes in zip(cases, accepted, strict=True) if case.expected and not yes]
    assert {name: lost.count(name) for name in set(lost)} == LOST
