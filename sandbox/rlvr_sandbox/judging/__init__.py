"""Judging programs: from a response and a spec to a verdict that the program cannot write."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from rlvr_sandbox.execution import Executor
from rlvr_sandbox.judging.extraction import extract_code
from rlvr_sandbox.judging.programs import judge_checker, judge_stdio
from rlvr_sandbox.judging.sessions import judge_call, judge_inproc, judge_split
from rlvr_sandbox.judging.suspicion import suspicions
from rlvr_sandbox.specs_code import CodeSpec
from rlvr_sandbox.verdicts import Judgement, SandboxError, Trust, Verdict

__all__ = ["judge_code"]

MAX_RESPONSE_CHARS = 1 << 20
_LARGE_CHARS = 1 << 13

_MODES: dict[str, Callable[[Executor, CodeSpec, str], Awaitable[Judgement]]] = {
    "stdio": judge_stdio,
    "checker": judge_checker,
    "call": judge_call,
    "split": judge_split,
    "inproc": judge_inproc,
}


async def judge_code(executor: Executor, spec: CodeSpec, response: str) -> Judgement:
    """The judgement of ``response`` as a program.

    Args:
        executor: Where programs run; its name decides whether the verdict is worth anything.
        spec: How it is judged.
        response: What the model said, or the program alone where ``spec.extract`` is false.

    Returns:
        A judgement with trust and flags; a failure of the executor is ``infra_error`` and never an exception.
    """
    started = time.monotonic()
    flags: tuple[str, ...] = ()
    try:
        source = _source(spec, response)
        if isinstance(source, str):
            flags = await _scan(source) if spec.language == "python" else ()
            judgement = await _run(executor, spec, source)
        else:
            judgement = source
    except SyntaxError as error:
        judgement = Judgement(Verdict.COMPILE_ERROR, f"{type(error).__name__}: {error}"[:200])
    except (SandboxError, OSError, EOFError) as error:
        judgement = Judgement(Verdict.INFRA_ERROR, f"{type(error).__name__}: {error}"[:200])
    return judgement._replace(seconds=time.monotonic() - started, trust=_trust(executor, spec), flags=flags)


def _source(spec: CodeSpec, response: str) -> str | Judgement:
    """The program, or the judgement of a response without one."""
    if len(response) > MAX_RESPONSE_CHARS:
        detail = f"the response has {len(response)} characters, more than {MAX_RESPONSE_CHARS}"
        return Judgement(Verdict.OUTPUT_LIMIT, detail)
    source = extract_code(response, spec.language) if spec.extract else response
    if source is None or not source.strip():
        return Judgement(Verdict.NO_ANSWER, "the response holds no program")
    return source


async def _run(executor: Executor, spec: CodeSpec, source: str) -> Judgement:
    if spec.language not in executor.languages:
        known = ", ".join(executor.languages)
        detail = f"the language {spec.language!r} cannot be run here, only {known}; install its toolchain"
        return Judgement(Verdict.INFRA_ERROR, detail)
    return await _MODES[spec.mode](executor, spec, source)


async def _scan(source: str) -> tuple[str, ...]:
    return await asyncio.to_thread(suspicions, source) if len(source) > _LARGE_CHARS else suspicions(source)


def _trust(executor: Executor, spec: CodeSpec) -> Trust:
    if executor.name == "none":
        return Trust.UNSAFE
    return Trust.INPROC if spec.mode == "inproc" else Trust.ISOLATED
