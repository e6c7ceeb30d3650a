"""SandboxFusion's ``POST /run_code``, as verl, ROLL and the ``sandbox-fusion`` client call it."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import PurePosixPath
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from rlvr_sandbox.bench import Bench
from rlvr_sandbox.execution import Ending, Limits, Outcome, Program
from rlvr_sandbox.routes.common import (
    BadRequestError,
    NoVerdictError,
    unless_dropped,
)

# verl gives up after both timeouts and 10 s more; a 504 that it retries has to arrive before.
SPARE_S = 8.0
MAX_TIMEOUT_S = 600.0
MAX_MEMORY_MB = 16_384
MAX_FILES = 64
DEFAULT_MEMORY_MB = 1_024

LANGUAGES = {"nodejs": "javascript", "js": "javascript"}

Timeout = Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S)]


class RunCodeRequest(BaseModel):
    """A program to run once. Timeouts are CPU seconds here, so that a busy machine fails nobody."""

    code: str
    language: Annotated[str, Field(max_length=32)]
    stdin: str | None = None
    compile_timeout: Timeout = 10.0
    run_timeout: Timeout = 10.0
    memory_limit_MB: Annotated[int, Field(ge=-1, le=MAX_MEMORY_MB)] = -1
    files: Annotated[dict[str, str | None], Field(max_length=MAX_FILES)] = {}
    fetch_files: list[str] = []


class CommandRunResult(BaseModel):
    """What came of compiling or running."""

    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    execution_time: float | None = None
    cpu_time: float | None = None
    return_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None


class RunCodeResponse(BaseModel):
    """What came of a request; ``message`` names the limit that was hit, if any."""

    status: Literal["Success", "Failed", "SandboxError"]
    message: str = ""
    compile_result: CommandRunResult | None = None
    run_result: CommandRunResult | None = None
    executor_pod_name: str | None = None
    files: dict[str, str] = {}


def fusion_routes(bench: Bench) -> APIRouter:
    """The route that answers from ``bench``."""
    router = APIRouter(tags=["SandboxFusion"])

    @router.post("/run_code")
    async def run_code(request: Request, body: RunCodeRequest) -> RunCodeResponse:
        """Run a program once and say what came of it."""
        deadline_s = body.compile_timeout + body.run_timeout + SPARE_S
        program, limits = _program(bench, body), _limits(body)
        stdin = (body.stdin or "").encode("utf-8", "replace")
        outcome = await unless_dropped(request, bench.run(program, limits, stdin, deadline_s))
        if outcome is None:
            raise NoVerdictError(f"the program had not run within {deadline_s:g} s because the service is busy")
        if outcome.ending is Ending.INFRA_ERROR:
            raise NoVerdictError(f"the sandbox failed ({outcome.detail})")
        return response(outcome)

    return router


def _program(bench: Bench, body: RunCodeRequest) -> Program:
    if body.fetch_files:
        raise BadRequestError("fetch_files is not supported: no file leaves the sandbox; print what you need instead")
    language = LANGUAGES.get(body.language, body.language)
    if language not in bench.lane().executor.languages:
        known = ", ".join(bench.lane().executor.languages)
        raise BadRequestError(f"language is {body.language!r}, which this service does not run; send one of {known}")
    files = {name: _content(name, text) for name, text in body.files.items() if text is not None}
    return Program(language, body.code.encode("utf-8", "replace").decode(), files)


def _content(name: str, text: str) -> bytes:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name or len(name) > 200:
        raise BadRequestError(f"files has the name {name[:80]!r}; send relative paths that stay beside the program")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequestError(f"files[{name[:80]!r}] is not base64 ({error}); encode its content") from error


def _limits(body: RunCodeRequest) -> Limits:
    memory_mb = body.memory_limit_MB if body.memory_limit_MB > 0 else DEFAULT_MEMORY_MB
    wall_s = min(3 * body.run_timeout + 2, body.compile_timeout + body.run_timeout + SPARE_S - 1)
    return Limits(cpu_s=body.run_timeout, wall_s=wall_s, memory_bytes=memory_mb << 20)


def response(outcome: Outcome) -> RunCodeResponse:
    """``outcome`` in SandboxFusion's words, which know neither memory nor output limits: those are failed runs."""
    pod = os.environ.get("MY_POD_NAME")
    result = CommandRunResult(
        status="TimeLimitExceeded" if outcome.ending is Ending.TIME_LIMIT else "Finished",
        execution_time=outcome.wall_s,
        cpu_time=outcome.cpu_s,
        return_code=_return_code(outcome),
        stdout=outcome.stdout.decode("utf-8", "replace"),
        stderr=outcome.stderr.decode("utf-8", "replace"),
    )
    if outcome.ending is Ending.COMPILE_ERROR:
        return RunCodeResponse(status="Failed", message=outcome.detail, compile_result=result, executor_pod_name=pod)
    succeeded = outcome.ending is Ending.EXITED and outcome.exit_status == 0
    return RunCodeResponse(
        status="Success" if succeeded else "Failed",
        message="" if outcome.ending in (Ending.EXITED, Ending.SIGNALLED) else outcome.detail or outcome.ending.value,
        run_result=result,
        executor_pod_name=pod,
    )


def _return_code(outcome: Outcome) -> int | None:
    """The exit status; minus the signal's number after a death by signal, as subprocess has it; None on time-out."""
    if outcome.ending is Ending.TIME_LIMIT:
        return None
    if outcome.ending is Ending.COMPILE_ERROR:
        return outcome.exit_status or 1
    if outcome.ending is Ending.EXITED:
        return outcome.exit_status
    return -(outcome.signal or 9)
