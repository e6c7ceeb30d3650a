"""What the executor reports becomes the right verdict, and a failure of ours never becomes one about the program."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from rlvr_sandbox.execution import Ending, Limits, Outcome, Program, Session
from rlvr_sandbox.guest.codec import decode, encode
from rlvr_sandbox.judging import judge_code
from rlvr_sandbox.specs_code import CodeSpec
from rlvr_sandbox.verdicts import Judgement, SandboxError, Trust, Verdict

STDIO = {"mode": "stdio", "tests": [{"stdin": "", "stdout": "1"}]}
CHECKER = {**STDIO, "mode": "checker", "checker": "check"}
CALL = {"mode": "call", "entry_point": "f", "tests": [{"args": [1], "expected": 1}]}
SPLIT = {"mode": "split", "entry_point": "f", "test_code": "assert f(1)"}
INPROC = {"mode": "inproc", "entry_point": "f", "test_code": "assert f(1)"}
LOADED = encode(["value", None])


def outcome(ending: Ending = Ending.EXITED, status: int | None = 0, stdout: bytes = b"1\n") -> Outcome:
    return Outcome(ending, status, None, stdout, b"", 0.0, 0.0)


class FakeSession:
    def __init__(self, answers: list[bytes | Exception | None], end: Outcome) -> None:
        self.answers, self.end, self.heard = answers, end, list[bytes]()

    async def call(self, frame: bytes) -> bytes | None:
        self.heard.append(frame)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        # A tester that knows its nonce echoes it.
        if answer is not None and b"NONCE-OF-16-BYTES"[:16] in answer:
            start: Any = decode(self.heard[0])
            answer = answer.replace(b"NONCE-OF-16-BYTES"[:16], start[0])
        return answer

    async def finish(self) -> Outcome:
        return self.end


class FakeExecutor:
    name = "ns"
    languages = ("python",)

    def __init__(self, *outcomes: Outcome | Exception, **sessions: FakeSession) -> None:
        self.outcomes, self.sessions, self.ran = list(outcomes), sessions, list[Program]()

    async def run(self, program: Program, limits: Limits, stdin: bytes = b"") -> Outcome:
        self.ran.append(program)
        result = self.outcomes.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def open(self, program: Program, limits: Limits, guest: str) -> AbstractAsyncContextManager[Session]:
        @contextlib.asynccontextmanager
        async def opened() -> AsyncIterator[Session]:
            self.ran.append(program)
            yield self.sessions[guest]

        return opened()

    async def close(self) -> None:
        pass


def judge(executor: FakeExecutor, spec: dict[str, Any], program: str = "f = abs") -> Judgement:
    return asyncio.run(judge_code(executor, CodeSpec.model_validate({"extract": False, **spec}), program))


@pytest.mark.parametrize(
    ("end", "verdict"),
    [
        (outcome(), Verdict.ACCEPTED),
        (outcome(status=1), Verdict.RUNTIME_ERROR),
        (Outcome(Ending.SIGNALLED, None, 11, b"1", b"", 0, 0), Verdict.RUNTIME_ERROR),
        (outcome(Ending.TIME_LIMIT, None), Verdict.TIME_LIMIT),
        (outcome(Ending.MEMORY_LIMIT, None), Verdict.MEMORY_LIMIT),
        (outcome(Ending.OUTPUT_LIMIT, None), Verdict.OUTPUT_LIMIT),
        (outcome(Ending.COMPILE_ERROR, None), Verdict.COMPILE_ERROR),
        (outcome(Ending.INFRA_ERROR, None), Verdict.INFRA_ERROR),
        (OSError("no slots"), Verdict.INFRA_ERROR),
        (SandboxError("no slots"), Verdict.INFRA_ERROR),
    ],
)
def test_endings_become_verdicts(end: Outcome | Exception, verdict: Verdict) -> None:
    assert judge(FakeExecutor(end), STDIO).verdict is verdict


@pytest.mark.parametrize(
    ("answers", "end", "verdict"),
    [
        ([LOADED, encode(["value", 1])], outcome(), Verdict.ACCEPTED),
        ([LOADED, encode(["value", True])], outcome(), Verdict.WRONG_ANSWER),
        ([LOADED, b"garbage"], outcome(), Verdict.WRONG_ANSWER),
        ([LOADED, encode(["verdict", "accepted"])], outcome(), Verdict.RUNTIME_ERROR),
        ([LOADED, encode(["value", 1, [1]])], outcome(), Verdict.RUNTIME_ERROR),
        ([encode(["value", 1])], outcome(), Verdict.RUNTIME_ERROR),
        ([b"garbage"], outcome(), Verdict.RUNTIME_ERROR),
        ([encode(["raised", "SyntaxError", "x"])], outcome(), Verdict.COMPILE_ERROR),
        ([None], outcome(), Verdict.RUNTIME_ERROR),
        ([LOADED, None], outcome(), Verdict.RUNTIME_ERROR),
        ([LOADED, None], outcome(Ending.TIME_LIMIT, None), Verdict.TIME_LIMIT),
        ([LOADED, None], outcome(Ending.INFRA_ERROR, None), Verdict.INFRA_ERROR),
        ([LOADED, OSError("broken")], outcome(), Verdict.INFRA_ERROR),
    ],
)
def test_what_a_called_program_says_is_a_claim(
    answers: list[bytes | Exception | None], end: Outcome, verdict: Verdict
) -> None:
    assert judge(FakeExecutor(call=FakeSession(answers, end)), CALL).verdict is verdict


def verdict_frame(status: str, nonce: bytes = b"NONCE-OF-16-BYTES"[:16]) -> bytes:
    return b"V" + encode([nonce, status, "", 2])


REQUEST = b"R" + encode(["call", "f", [1], {}, False])


@pytest.mark.parametrize(
    ("answers", "end", "verdict"),
    [
        ([verdict_frame("passed")], outcome(), Verdict.ACCEPTED),
        ([verdict_frame("failed")], outcome(), Verdict.WRONG_ANSWER),
        ([verdict_frame("broken")], outcome(), Verdict.INFRA_ERROR),
        ([verdict_frame("splendid")], outcome(), Verdict.INFRA_ERROR),
        ([verdict_frame("passed", bytes(16))], outcome(), Verdict.INFRA_ERROR),
        ([verdict_frame("passed")[1:]], outcome(), Verdict.INFRA_ERROR),
        ([verdict_frame("passed") + b"n"], outcome(), Verdict.INFRA_ERROR),
        ([verdict_frame("passed")], outcome(status=1), Verdict.INFRA_ERROR),
        ([verdict_frame("passed")], outcome(Ending.SIGNALLED, None), Verdict.INFRA_ERROR),
        ([None], outcome(), Verdict.INFRA_ERROR),
        ([None], outcome(Ending.TIME_LIMIT, None), Verdict.INFRA_ERROR),
        ([REQUEST, REQUEST, None], outcome(Ending.TIME_LIMIT, None), Verdict.TIME_LIMIT),
        ([REQUEST, REQUEST, verdict_frame("passed")], outcome(Ending.MEMORY_LIMIT, None), Verdict.MEMORY_LIMIT),
        ([REQUEST, REQUEST, None], outcome(Ending.SIGNALLED, None), Verdict.INFRA_ERROR),
    ],
)
def test_only_the_tests_own_word_with_the_nonce_and_status_0_is_a_verdict(
    answers: list[bytes | Exception | None], end: Outcome, verdict: Verdict
) -> None:
    program = FakeSession([LOADED, encode(["value", 1]), encode(["value", 1])], outcome())
    executor = FakeExecutor(call=program, tester=FakeSession(answers, end))
    assert judge(executor, SPLIT).verdict is verdict
    # No text of the tests is in the program's sandbox, and no text of the program in the tests'.
    assert [item.source for item in executor.ran] == ["f = abs", "assert f(1)"]


def test_a_program_that_dies_ends_the_tests_without_a_word_to_them() -> None:
    tester = FakeSession([REQUEST], outcome())
    executor = FakeExecutor(call=FakeSession([LOADED, None], outcome(Ending.MEMORY_LIMIT, None)), tester=tester)
    assert judge(executor, SPLIT).verdict is Verdict.MEMORY_LIMIT
    assert len(tester.heard) == 1


@pytest.mark.parametrize(
    ("answer", "end", "verdict"),
    [
        (verdict_frame("passed")[1:], outcome(), Verdict.ACCEPTED),
        (verdict_frame("broken")[1:], outcome(), Verdict.WRONG_ANSWER),
        (verdict_frame("passed", bytes(16))[1:], outcome(), Verdict.RUNTIME_ERROR),
        (verdict_frame("passed")[1:], outcome(status=3), Verdict.RUNTIME_ERROR),
        (verdict_frame("passed")[1:], outcome(Ending.INFRA_ERROR, None), Verdict.INFRA_ERROR),
        (None, outcome(), Verdict.RUNTIME_ERROR),
    ],
)
def test_inproc_needs_the_nonce_and_is_labelled(answer: bytes | None, end: Outcome, verdict: Verdict) -> None:
    class Session(FakeSession):
        async def call(self, frame: bytes) -> bytes | None:
            if self.answers and self.answers[0] is not None and self.heard:
                self.heard = [frame]
                request: Any = decode(frame)
                return bytes(self.answers[0]).replace(b"NONCE-OF-16-BYTES"[:16], request[0])
            return await super().call(frame)

    judgement = judge(FakeExecutor(inproc=Session([LOADED, answer], end)), INPROC)
    assert judgement.verdict is verdict
    assert judgement.trust is Trust.INPROC


@pytest.mark.parametrize(
    ("checker", "control", "verdict"),
    [
        (outcome(), None, Verdict.ACCEPTED),
        (outcome(status=1), None, Verdict.WRONG_ANSWER),
        (outcome(Ending.INFRA_ERROR, None), None, Verdict.INFRA_ERROR),
        (outcome(status=2), outcome(status=2), Verdict.INFRA_ERROR),
        (outcome(status=2), outcome(status=1), Verdict.INFRA_ERROR),
        (outcome(status=2), outcome(), Verdict.WRONG_ANSWER),
        (outcome(Ending.TIME_LIMIT, None), outcome(), Verdict.WRONG_ANSWER),
        (outcome(Ending.TIME_LIMIT, None), outcome(Ending.TIME_LIMIT, None), Verdict.INFRA_ERROR),
    ],
)
def test_a_checker_says_0_or_1_or_nothing(checker: Outcome, control: Outcome | None, verdict: Verdict) -> None:
    executor = FakeExecutor(outcome(stdout=b"claim"), checker, *([control] if control else []))
    assert judge(executor, CHECKER, "print('claim')").verdict is verdict
    assert executor.ran[0].files == {}
    assert executor.ran[1].files == {"input.txt": b"", "expected.txt": b"1", "output.txt": b"claim"}
    assert not executor.outcomes


def test_a_language_that_is_not_there_is_no_fault_of_the_program() -> None:
    judgement = judge(FakeExecutor(), {**STDIO, "language": "cobol"})
    assert judgement.verdict is Verdict.INFRA_ERROR
    assert "'cobol'" in judgement.detail


def test_an_overlong_response_is_a_verdict() -> None:
    assert judge(FakeExecutor(), STDIO, "x" * (2 << 20)).verdict is Verdict.OUTPUT_LIMIT
