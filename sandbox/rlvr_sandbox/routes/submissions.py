"""SandboxFusion's ``POST /submit`` and ScaleBox's ``POST /common_evaluate_batch``: a completion against given tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, ValidationError

from rlvr_sandbox.bench import Bench
from rlvr_sandbox.items import MAX_ITEMS, CodeItem
from rlvr_sandbox.judging.extraction import extract_code
from rlvr_sandbox.routes.asserts import assert_spec
from rlvr_sandbox.routes.common import AnyJSONResponse, BadRequestError, NoVerdictError, unless_dropped
from rlvr_sandbox.routes.fusion import LANGUAGES, SPARE_S, CommandRunResult, RunCodeResponse, Timeout
from rlvr_sandbox.specs_code import CodeSpec
from rlvr_sandbox.verdicts import Judgement, Verdict

MAX_DEADLINE_S = 600.0

# ScaleBox's special judges read stdin.txt, stdout.txt (what is expected) and answer.txt (what was printed).
_SPECIAL_JUDGE = """\
import shutil
for ours, theirs in (("input.txt", "stdin.txt"), ("expected.txt", "stdout.txt"), ("output.txt", "answer.txt")):
    shutil.copyfile(ours, theirs)
"""


class TestConfig(BaseModel):
    """How to judge a completion."""

    __test__ = False

    language: str | None = None
    dataset_type: str | None = None
    compile_timeout: Timeout | None = None
    run_timeout: Timeout | None = None
    provided_data: dict[str, Any] | list[dict[str, Any]] | None = None
    extra: dict[str, Any] = {}


class SubmitRequest(BaseModel):
    """A completion and the data of its problem, which has to come along: this service stores no datasets."""

    completion: str
    config: TestConfig
    dataset: str = ""
    id: int | str = 0


class EvalTestCase(BaseModel):
    """What came of one test."""

    passed: bool
    exec_info: RunCodeResponse
    test_info: dict[str, Any] | None = None


class EvalResult(BaseModel):
    """What came of a completion; ``trust`` is as in ``/v1/verify``."""

    id: int | str
    accepted: bool
    extracted_code: str
    full_code: str | None = None
    test_code: str | None = None
    tests: list[EvalTestCase]
    extracted_type: str | None = None
    extra: dict[str, Any] | None = Field(None, description="`trust` and `flags` of the verdict")


class _Test(NamedTuple):
    """One test as a specification of its own, and what the answer repeats of it."""

    spec: CodeSpec
    info: dict[str, Any] | None


def submission_routes(bench: Bench) -> APIRouter:
    """The routes that answer from ``bench``."""
    router = APIRouter(tags=["SandboxFusion"])

    @router.post("/submit", response_model=EvalResult)
    async def submit(request: Request, body: SubmitRequest) -> Response:
        """Judge a completion by the tests in `config.provided_data`: CommonOJ, HumanEval and AutoEval problems."""
        evaluated = await unless_dropped(request, _evaluate(bench, body, _fusion_tests(body)))
        return AnyJSONResponse(evaluated.model_dump())

    @router.post("/common_evaluate_batch", response_model=EvalResult)
    async def common_evaluate_batch(request: Request, body: SubmitRequest) -> Response:
        """Judge a completion by ScaleBox's `test_cases`: stdin_stdout, function_call, assert, special judges."""
        evaluated = await unless_dropped(request, _evaluate(bench, body, _scalebox_tests(body)))
        return AnyJSONResponse(evaluated.model_dump())

    return router


async def _evaluate(bench: Bench, body: SubmitRequest, tests: Sequence[_Test]) -> EvalResult:
    bench.lane()
    if not 1 <= len(tests) <= MAX_ITEMS:
        raise BadRequestError(f"provided_data holds {len(tests)} tests; send 1 to {MAX_ITEMS}")
    config = body.config
    seconds = (config.compile_timeout or 10.0) + (config.run_timeout or 10.0) * len(tests) + SPARE_S
    code = _code(body)
    items = [CodeItem(kind="code", response=code, spec=test.spec) for test in tests]
    judgements = await bench.judge(items, min(seconds, MAX_DEADLINE_S))
    for judgement in judgements:
        if judgement.verdict is Verdict.INFRA_ERROR:
            raise NoVerdictError(f"a test was left without a verdict ({judgement.detail})")
    return EvalResult(
        id=body.id,
        accepted=all(judgement.verdict is Verdict.ACCEPTED for judgement in judgements),
        extracted_code=code,
        tests=[_case(test, judgement) for test, judgement in zip(tests, judgements, strict=True)],
        extra={
            "trust": max(judgement.trust for judgement in judgements),
            "flags": sorted({flag for judgement in judgements for flag in judgement.flags}),
        },
    )


def _case(test: _Test, judgement: Judgement) -> EvalTestCase:
    """One test's verdict in SandboxFusion's words."""
    verdict = judgement.verdict
    ran = verdict in (Verdict.ACCEPTED, Verdict.WRONG_ANSWER)
    result = CommandRunResult(
        status="TimeLimitExceeded" if verdict is Verdict.TIME_LIMIT else "Finished",
        execution_time=judgement.seconds,
        return_code=0 if ran else None if verdict is Verdict.TIME_LIMIT else 1,
        stderr=judgement.detail,
    )
    compiled = verdict is not Verdict.COMPILE_ERROR
    return EvalTestCase(
        passed=verdict is Verdict.ACCEPTED,
        exec_info=RunCodeResponse(
            status="Success" if ran else "Failed",
            message=verdict.value,
            compile_result=None if compiled else result,
            run_result=result if compiled else None,
        ),
        test_info=test.info,
    )


def _fusion_tests(body: SubmitRequest) -> list[_Test]:
    data = body.config.provided_data
    if not isinstance(data, dict) or "test" not in data:
        raise BadRequestError(
            f"config.provided_data has no 'test' and this service stores no dataset {body.dataset[:60]!r}; "
            "send the problem's row there"
        )
    tests = _parsed(data["test"])
    if isinstance(tests, list):
        return [_stdio(body, _field(test, "input", "stdin"), _field(test, "output", "stdout")) for test in tests]
    source = tests.get("code") if isinstance(tests, dict) else tests
    labels = _parsed(data.get("labels") or {})
    entry_point = data.get("entry_point") or (labels.get("entry_point") if isinstance(labels, dict) else None)
    return [_asserts(body, source, entry_point)]


def _parsed(value: Any) -> Any:
    """SandboxFusion's tables hold JSON as text; source code stays what it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _field(test: Any, side: str, stream: str) -> str:
    streams = test.get(side) if isinstance(test, dict) else None
    if not isinstance(streams, dict) or set(streams) - {stream} or not isinstance(streams.get(stream, ""), str):
        raise BadRequestError(f"a test's {side} is not {{'{stream}': text}}; other files are not supported")
    return str(streams.get(stream, ""))


def _scalebox_tests(body: SubmitRequest) -> list[_Test]:
    data = body.config.provided_data
    cases = data.get("test_cases") if isinstance(data, dict) else None
    if not isinstance(cases, dict):
        raise BadRequestError("config.provided_data.test_cases is not an object; send {type, input, output}")
    kind = cases.get("type") or ("function_call" if cases.get("fn_name") else "stdin_stdout")
    if kind == "assert":
        return [_asserts(body, cases.get("test") or cases.get("tests"), cases.get("entry_point"))]
    inputs, outputs = cases.get("input"), cases.get("output")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise BadRequestError("test_cases.input and test_cases.output are not lists of the same length")
    if kind == "stdin_stdout":
        return [_stdio(body, str(given), str(wanted)) for given, wanted in zip(inputs, outputs, strict=True)]
    if kind == "function_call":
        return [_call(body, cases, given, wanted) for given, wanted in zip(inputs, outputs, strict=True)]
    raise BadRequestError(f"test_cases.type is {str(kind)[:40]!r}; send stdin_stdout, function_call or assert")


def _call(body: SubmitRequest, cases: Mapping[str, Any], given: Any, wanted: Any) -> _Test:
    if cases.get("json_input") and isinstance(given, str):
        try:
            given, wanted = [json.loads(line) for line in given.split("\n")], [json.loads(wanted)]
        except (ValueError, TypeError) as error:
            raise BadRequestError(f"test_cases.input is not JSON lines ({error})") from error
    if not isinstance(given, list) or not isinstance(wanted, list) or len(wanted) != 1:
        raise BadRequestError("a function_call test is not {input: [arguments], output: [value]}")
    spec = {"mode": "call", "entry_point": cases.get("fn_name"), "tests": [{"args": given, "expected": wanted[0]}]}
    info = {"type": "function_call", "fn_name": cases.get("fn_name"), "input": given, "output": wanted}
    return _Test(_spec(body, spec), info)


def _stdio(body: SubmitRequest, given: str, wanted: str) -> _Test:
    spec: dict[str, Any] = {"mode": "stdio", "tests": [{"stdin": given, "stdout": wanted}]}
    if judge := body.config.extra.get("special_judge_program"):
        language = body.config.extra.get("special_judge_language", "python")
        if language != "python" or not isinstance(judge, str):
            raise BadRequestError(f"extra.special_judge_language is {str(language)[:40]!r}; send a Python program")
        spec |= {"mode": "checker", "checker": _SPECIAL_JUDGE + judge}
    return _Test(_spec(body, spec), {"input": {"stdin": given}, "output": {"stdout": wanted}})


def _asserts(body: SubmitRequest, source: Any, entry_point: Any) -> _Test:
    if not isinstance(source, str) or _language(body) != "python":
        raise BadRequestError("assert tests are supported for Python only; send them as source text")
    name = entry_point if isinstance(entry_point, str) else None
    return _Test(_spec(body, assert_spec(source, name, _code(body))), None)


def _language(body: SubmitRequest) -> str:
    language = body.config.language or "python"
    return LANGUAGES.get(language, language)


def _code(body: SubmitRequest) -> str:
    """The program of the completion; one without a fenced block is the program itself."""
    code = extract_code(body.completion, _language(body))
    return body.completion if code is None else code


def _spec(body: SubmitRequest, spec: dict[str, Any]) -> CodeSpec:
    limits = {"cpu_s": body.config.run_timeout or 10.0}
    try:
        return CodeSpec.model_validate({"language": _language(body), "limits": limits, "extract": False, **spec})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:60]
        raise BadRequestError(f"the problem's {place} is refused ({first['msg'][:160]})") from error
