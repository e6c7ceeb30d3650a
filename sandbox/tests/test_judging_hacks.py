"""Reward hacks × modes: none is accepted, none gets itself masked, and the honest program passes everywhere."""

from __future__ import annotations

import asyncio

import pytest
from hack_programs import HONEST, as_program, hacks, specs
from rlvr_sandbox.isolation import open_executor
from rlvr_sandbox.judging import judge_code
from rlvr_sandbox.specs_code import CodeSpec
from rlvr_sandbox.verdicts import Judgement, SandboxError, Verdict

CPU_S = 0.3


async def judge_all(mode: str, programs: dict[str, str]) -> dict[str, Judgement]:
    spec = CodeSpec.model_validate(specs(CPU_S)[mode])
    try:
        executor = await open_executor("auto", slots=4)
    except SandboxError:  # This machine cannot isolate; what the modes promise must hold all the same.
        executor = await open_executor("none", slots=4, unsafe=True)
    turn = asyncio.Semaphore(4)

    async def judge(program: str) -> Judgement:
        async with turn:
            return await judge_code(executor, spec, program)

    try:
        judgements = await asyncio.gather(*map(judge, programs.values()))
    finally:
        await executor.close()
    return dict(zip(programs, judgements, strict=True))


@pytest.mark.parametrize("mode", ["stdio", "call", "split", "checker"])
def test_no_hack_is_accepted(mode: str) -> None:
    programs = {"honest": as_program(HONEST), **hacks()}
    assert len(programs) > 100
    judgements = asyncio.run(judge_all(mode, programs))
    honest = judgements.pop("honest")
    assert honest.verdict is Verdict.ACCEPTED, honest
    assert honest.flags == ()
    assert [name for name, judgement in judgements.items() if judgement.verdict is Verdict.ACCEPTED] == []
    # A program that could have itself masked would never be punished for a wrong answer.
    assert [item for item in judgements.items() if item[1].verdict is Verdict.INFRA_ERROR] == []
