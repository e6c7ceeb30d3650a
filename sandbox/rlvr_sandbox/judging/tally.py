"""From the judgements of single tests to that of the program."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from rlvr_sandbox.specs_code import CodeSpec
from rlvr_sandbox.verdicts import Judgement, Verdict

Test = TypeVar("Test")


async def tally(tests: Sequence[Test], spec: CodeSpec, judge: Callable[[Test], Awaitable[Judgement]]) -> Judgement:
    """The judgement of the first test that is not passed; the tests after it are run only where ``run_all``."""
    first: Judgement | None = None
    passed = 0
    for test in tests:
        judgement = await judge(test)
        if judgement.verdict is Verdict.ACCEPTED:
            passed += 1
            continue
        first = first or judgement
        if not spec.run_all or judgement.verdict is Verdict.INFRA_ERROR:
            break
    if first is None:
        return Judgement(Verdict.ACCEPTED)
    if spec.run_all and first.verdict is not Verdict.INFRA_ERROR:
        return first._replace(detail=f"{passed} of {len(tests)} tests passed; the first failure: {first.detail}")
    return first
