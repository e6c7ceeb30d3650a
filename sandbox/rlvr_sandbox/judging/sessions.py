"""Modes in which the program stays and is asked: calls from here, or from tests in a sandbox of their own."""

from __future__ import annotations

import ast
import asyncio
import secrets
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from rlvr_sandbox.execution import Ending, Executor, Outcome, Program, Session
from rlvr_sandbox.guest.codec import CodecError, decode, encode
from rlvr_sandbox.judging.equality import difference
from rlvr_sandbox.judging.outcomes import MAX_DETAIL_CHARS, end_of_session
from rlvr_sandbox.judging.tally import tally
from rlvr_sandbox.specs_code import CallTest, CodeSpec
from rlvr_sandbox.typed_json import from_json
from rlvr_sandbox.verdicts import Judgement, Verdict

_LARGE_BYTES = 1 << 16
_STATUS = {"passed": Verdict.ACCEPTED, "failed": Verdict.WRONG_ANSWER, "broken": Verdict.INFRA_ERROR}
_RAISED = {
    "SyntaxError": Verdict.COMPILE_ERROR,
    "IndentationError": Verdict.COMPILE_ERROR,
    "MemoryError": Verdict.MEMORY_LIMIT,
}
_LIMITS = {
    Ending.TIME_LIMIT: Verdict.TIME_LIMIT,
    Ending.MEMORY_LIMIT: Verdict.MEMORY_LIMIT,
    Ending.OUTPUT_LIMIT: Verdict.OUTPUT_LIMIT,
}

_pairing: WeakKeyDictionary[Executor, asyncio.Lock] = WeakKeyDictionary()


async def judge_call(executor: Executor, spec: CodeSpec, source: str) -> Judgement:
    """Call the entry point with each test's arguments; the next ones are sent only after a right answer."""
    tests = [test for test in spec.tests if isinstance(test, CallTest)]
    async with executor.open(Program("python", source), spec.limits.limits(), "call") as session:
        if refused := await _load(session, ["load", False]):
            return refused

        async def judge(test: CallTest) -> Judgement:
            request = ["call", spec.entry_point, from_json(test.args), from_json(test.kwargs), spec.inplace]
            try:
                frame = encode(request)
            except CodecError as error:
                return Judgement(Verdict.INFRA_ERROR, f"the arguments of a test do not cross ({error})")
            reply = await session.call(frame)
            if reply is None:
                return end_of_session(await session.finish())
            if len(reply) > _LARGE_BYTES:
                return await asyncio.to_thread(_judge_reply, reply, test, spec)
            return _judge_reply(reply, test, spec)

        return await tally(tests, spec, judge)


def _judge_reply(reply: bytes, test: CallTest, spec: CodeSpec) -> Judgement:
    try:
        claim: Any = decode(reply)
    except CodecError as error:
        return Judgement(Verdict.WRONG_ANSWER, f"the answer is no plain data ({error})")
    match claim:
        case ["value", None, [first, *_]] if spec.inplace:
            value = first
        case ["value", value, list()] if spec.inplace:
            pass
        case ["value", value]:
            pass
        case ["raised", "CodecError", str(message)]:
            return Judgement(Verdict.WRONG_ANSWER, message[:MAX_DETAIL_CHARS])
        case _:
            return _raised(claim)
    found = difference(from_json(test.expected), value, spec.compare)
    return Judgement(Verdict.WRONG_ANSWER, found[:MAX_DETAIL_CHARS]) if found else Judgement(Verdict.ACCEPTED)


def _raised(claim: object) -> Judgement:
    match claim:
        case ["raised", str(name), str(message)]:
            detail = f"{name}: {message}"[:MAX_DETAIL_CHARS]
            return Judgement(_RAISED.get(name, Verdict.RUNTIME_ERROR), detail)
    return Judgement(Verdict.RUNTIME_ERROR, "the program answered with something that is no answer")


async def _load(session: Session, request: list[object]) -> Judgement | None:
    """Have the guest load the program; the judgement where it did not come up."""
    reply = await session.call(encode(request))
    if reply is None:
        return end_of_session(await session.finish())
    try:
        claim = decode(reply)
    except CodecError:
        claim = None
    return None if claim == ["value", None] else _raised(claim)


async def judge_split(executor: Executor, spec: CodeSpec, source: str) -> Judgement:
    """Run the tests in a sandbox where no candidate code runs, and pass their calls on to the program's sandbox."""
    # Each of the two waits for the other, so neither one's wall time is its own.
    limits = spec.limits.limits()
    limits = replace(limits, wall_s=2 * (3 * limits.cpu_s + 2))
    tests = Program("python", spec.test_code or "")
    async with AsyncExitStack() as stack:
        # Were others let in between the two, all slots could be held by items that wait for their second one.
        async with _pairing.setdefault(executor, asyncio.Lock()):
            program = await stack.enter_async_context(executor.open(Program("python", source), limits, "call"))
            tester = await stack.enter_async_context(executor.open(tests, limits, "tester"))
        return await _load(program, ["load", True]) or await _relay(tester, program, spec)


async def _relay(tester: Session, program: Session, spec: CodeSpec) -> Judgement:
    nonce = secrets.token_bytes(16)
    requests = 0
    frame = await tester.call(encode([nonce, spec.entry_point, spec.inplace, spec.objects]))
    while frame is not None and frame[:1] == b"R":
        reply = await program.call(frame[1:])
        if reply is None:
            return end_of_session(await program.finish())
        requests += 1
        frame = await tester.call(reply)
    outcome = await tester.finish()
    if frame is None or outcome.ending is not Ending.EXITED or outcome.exit_status != 0:
        return _tests_ended(outcome, requests)
    verdict = _verdict(frame[1:], nonce)
    return verdict or Judgement(Verdict.INFRA_ERROR, "the tests ended without a verdict")


def _tests_ended(outcome: Outcome, requests: int) -> Judgement:
    """The judgement where the tests did not end well.

    What a program returns can exhaust the tests' limits, and a policy must not learn to have itself masked that way.
    The first request only looks the program up.
    """
    detail = f"the tests ended with {outcome.ending}, exit status {outcome.exit_status} {outcome.detail}".strip()
    verdict = _LIMITS.get(outcome.ending, Verdict.INFRA_ERROR) if requests > 1 else Verdict.INFRA_ERROR
    return Judgement(verdict, detail[:MAX_DETAIL_CHARS])


def _verdict(frame: bytes, nonce: bytes) -> Judgement | None:
    """What the tests say, if it is they who say it."""
    try:
        said: Any = decode(frame)
    except CodecError:
        return None
    match said:
        case [bytes(echoed), str(status), str(detail), *_] if status in _STATUS:
            return Judgement(_STATUS[status], detail) if secrets.compare_digest(echoed, nonce) else None
    return None


async def judge_inproc(executor: Executor, spec: CodeSpec, source: str) -> Judgement:
    """Run the tests beside the program, which could forge what they say: the verdict is labelled so."""
    try:
        ast.parse(spec.test_code or "")
    except SyntaxError as error:
        return Judgement(Verdict.INFRA_ERROR, f"test_code does not compile ({error})"[:MAX_DETAIL_CHARS])
    nonce = secrets.token_bytes(16)
    async with executor.open(Program("python", source), spec.limits.limits(), "inproc") as session:
        if refused := await _load(session, ["load"]):
            return refused
        reply = await session.call(encode([nonce, spec.entry_point, spec.test_code]))
        outcome = await session.finish()
    judgement = None if reply is None else _verdict(reply, nonce)
    if judgement is None or outcome.ending is not Ending.EXITED or outcome.exit_status != 0:
        return end_of_session(outcome)
    # "broken" is the program's word too here, and must not mask it.
    return judgement._replace(verdict=Verdict.WRONG_ANSWER) if judgement.verdict is Verdict.INFRA_ERROR else judgement
