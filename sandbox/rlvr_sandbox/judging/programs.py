"""Modes in which the program runs from start to end: its output is compared, or another program judges it."""

from __future__ import annotations

import asyncio

from rlvr_sandbox.execution import Ending, Executor, Outcome, Program
from rlvr_sandbox.judging.outcomes import failure, last_line
from rlvr_sandbox.judging.stdout import printed_the_same
from rlvr_sandbox.judging.tally import tally
from rlvr_sandbox.specs_code import CodeSpec, StdioTest
from rlvr_sandbox.verdicts import Judgement, Verdict

_WRONG_OUTPUT = Judgement(Verdict.WRONG_ANSWER, "the output is not the expected one")
_LARGE_BYTES = 1 << 16


async def judge_stdio(executor: Executor, spec: CodeSpec, source: str) -> Judgement:
    """Run the program on every test's input and compare what it prints; the expected output stays here."""
    tests = _stdio_tests(spec)
    if not spec.compare.allow_empty and any(not test.stdout.strip() for test in tests):
        detail = (
            "a test expects no output, which a program that does nothing prints; set compare.allow_empty or drop it"
        )
        return Judgement(Verdict.INFRA_ERROR, detail)

    async def judge(test: StdioTest) -> Judgement:
        outcome = await _run(executor, spec, source, test)
        if failed := failure(outcome):
            return failed
        expected = test.stdout.encode("utf-8", "surrogatepass")
        if max(len(outcome.stdout), len(expected)) > _LARGE_BYTES:
            same = await asyncio.to_thread(printed_the_same, expected, outcome.stdout, spec.compare)
        else:
            same = printed_the_same(expected, outcome.stdout, spec.compare)
        return Judgement(Verdict.ACCEPTED) if same else _WRONG_OUTPUT

    return await tally(tests, spec, judge)


async def judge_checker(executor: Executor, spec: CodeSpec, source: str) -> Judgement:
    """Run the program on every test's input and let the checker, in its own sandbox, judge what it prints."""

    async def judge(test: StdioTest) -> Judgement:
        outcome = await _run(executor, spec, source, test)
        return failure(outcome) or await _check(executor, spec, test, outcome.stdout)

    return await tally(_stdio_tests(spec), spec, judge)


async def _check(executor: Executor, spec: CodeSpec, test: StdioTest, printed: bytes) -> Judgement:
    outcome = await _run_checker(executor, spec, test, printed)
    if (verdict := _said(outcome)) is not None:
        return Judgement(verdict, last_line(outcome.stderr))
    detail = f"the checker ended with {outcome.ending} and exit status {outcome.exit_status}"
    broken = Judgement(Verdict.INFRA_ERROR, f"{detail} {outcome.detail or last_line(outcome.stderr)}".strip())
    if outcome.ending is Ending.INFRA_ERROR:
        return broken
    # A policy must not learn to have bad answers masked by printing what breaks the checker: if the checker accepts the
    # reference output, it was the program's output that broke it.
    control = await _run_checker(executor, spec, test, test.stdout.encode("utf-8", "surrogatepass"))
    if _said(control) is not Verdict.ACCEPTED:
        return broken
    return Judgement(Verdict.WRONG_ANSWER, f"{detail} on this output, but accepts the reference output")


def _said(outcome: Outcome) -> Verdict | None:
    if outcome.ending is not Ending.EXITED:
        return None
    return {0: Verdict.ACCEPTED, 1: Verdict.WRONG_ANSWER}.get(outcome.exit_status or 0)


async def _run_checker(executor: Executor, spec: CodeSpec, test: StdioTest, printed: bytes) -> Outcome:
    files = {
        "input.txt": test.stdin.encode("utf-8", "surrogatepass"),
        "expected.txt": test.stdout.encode("utf-8", "surrogatepass"),
        "output.txt": printed,
    }
    return await executor.run(Program("python", spec.checker or "", files), spec.limits.limits())


async def _run(executor: Executor, spec: CodeSpec, source: str, test: StdioTest) -> Outcome:
    stdin = test.stdin.encode("utf-8", "surrogatepass")
    return await executor.run(Program(spec.language, source), spec.limits.limits(), stdin)


def _stdio_tests(spec: CodeSpec) -> list[StdioTest]:
    return [test for test in spec.tests if isinstance(test, StdioTest)]
