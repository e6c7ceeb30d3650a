"""Routes that answer with a reward: slime's remote reward model and NeMo-Gym's resource server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from rlvr_sandbox.bench import Bench
from rlvr_sandbox.items import CodeItem, Item, TaggedItem
from rlvr_sandbox.routes.common import AnyJSONResponse, BadRequestError, NoVerdictError, unless_dropped
from rlvr_sandbox.verdicts import Judgement, Verdict

# slime gives up after 120 s; what it retries has to arrive before.
DEADLINE_S = 100.0

_ITEM: TypeAdapter[Item] = TypeAdapter(TaggedItem)


class RewardRequest(BaseModel):
    """What slime sends: ``label`` is ``{"kind", "spec"}``, the same as JSON text, or a plain reference answer."""

    response: str
    label: dict[str, Any] | str | int | float
    prompt: Any = None


class GymRequest(BaseModel):
    """What NeMo-Gym sends: the model's ``response`` in the form of OpenAI's Responses API.

    The task is ``verifier_metadata`` as ``{"kind", "spec"}`` or with ``unit_tests`` as LiveCodeBench has them, or
    ``expected_answer`` for mathematics. Every field comes back in the answer.
    """

    model_config = ConfigDict(extra="allow")

    response: dict[str, Any]
    verifier_metadata: dict[str, Any] | None = None
    expected_answer: str | int | float | None = None


class GymResponse(BaseModel):
    """The request again, with its reward."""

    model_config = ConfigDict(extra="allow")

    reward: float
    verdict: Verdict
    detail: str


def reward_routes(bench: Bench) -> APIRouter:
    """The routes that answer from ``bench``."""
    router = APIRouter(tags=["rewards"])

    @router.post("/rm")
    async def remote_reward(request: Request, body: RewardRequest) -> float:
        """The reward itself, 1 or 0; without a verdict there is no number but an error to retry."""
        judgement = await unless_dropped(request, _judge(bench, _item(_task(body.label), body.response)))
        return _reward(judgement)

    @router.post("/verify", response_model=GymResponse)
    async def gym(request: Request, body: GymRequest) -> Response:
        """The request again, with `reward`; without a verdict there is no reward but an error to retry."""
        judgement = await unless_dropped(request, _judge(bench, _item(_gym_task(body), _output_text(body.response))))
        answer = {"reward": _reward(judgement), "verdict": judgement.verdict, "detail": judgement.detail}
        return AnyJSONResponse({**body.model_dump(exclude_none=True), **answer})

    return router


async def _judge(bench: Bench, item: Item) -> Judgement:
    if isinstance(item, CodeItem):
        bench.lane()
    (judgement,) = await bench.judge([item], DEADLINE_S)
    return judgement


def _reward(judgement: Judgement) -> float:
    if judgement.verdict is Verdict.INFRA_ERROR:
        raise NoVerdictError(f"the response was left without a verdict ({judgement.detail})")
    return float(judgement.verdict is Verdict.ACCEPTED)


def _item(task: Mapping[str, Any], response: str) -> Item:
    try:
        return _ITEM.validate_python({"kind": task.get("kind"), "spec": task.get("spec"), "response": response})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the task"
        raise BadRequestError(
            f"{place} is refused ({first['msg'][:160]}); send {{kind, spec}} as in /v1/verify"
        ) from error


def _task(label: dict[str, Any] | str | int | float) -> Mapping[str, Any]:
    """A label that is a task, or else the reference answer of a mathematical question."""
    if isinstance(label, dict):
        return label
    text = str(label)
    if text.lstrip().startswith("{"):
        try:
            task = json.loads(text)
        except ValueError:
            task = None
        if isinstance(task, dict) and "kind" in task:
            return task
    return {"kind": "math", "spec": {"answer": text}}


def _gym_task(body: GymRequest) -> Mapping[str, Any]:
    metadata = body.verifier_metadata or {}
    if "kind" in metadata:
        return metadata
    if "unit_tests" in metadata:
        return {"kind": "code", "spec": _live_code_bench(metadata["unit_tests"])}
    if body.expected_answer is not None:
        return {"kind": "math", "spec": {"answer": str(body.expected_answer)}}
    raise BadRequestError(
        "there is no task; send verifier_metadata with {kind, spec} or unit_tests, or expected_answer"
    )


def _live_code_bench(tests: Any) -> dict[str, Any]:
    """LiveCodeBench's ``{inputs, outputs, fn_name}``: programs, or functions called with JSON lines."""
    if not isinstance(tests, dict):
        raise BadRequestError("verifier_metadata.unit_tests is not an object; send {inputs, outputs, fn_name}")
    inputs, outputs, name = tests.get("inputs"), tests.get("outputs"), tests.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise BadRequestError("unit_tests.inputs and unit_tests.outputs are not lists of the same length")
    pairs = list(zip(inputs, outputs, strict=True))
    if not name:
        return {"mode": "stdio", "tests": [{"stdin": given, "stdout": wanted} for given, wanted in pairs]}
    try:
        calls = [
            {"args": [json.loads(line) for line in given.split("\n")], "expected": json.loads(wanted)}
            for given, wanted in pairs
        ]
    except (ValueError, TypeError, AttributeError) as error:
        raise BadRequestError(f"unit_tests.inputs and outputs are not JSON lines ({error})") from error
    return {"mode": "call", "entry_point": name, "tests": calls}


def _output_text(response: Mapping[str, Any]) -> str:
    """The text of the model's messages; reasoning and tool calls are not part of the answer."""
    output = response.get("output")
    texts = [
        part["text"]
        for message in (output if isinstance(output, list) else [])
        if isinstance(message, dict) and message.get("type") == "message" and isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, dict) and part.get("type") == "output_text" and isinstance(part.get("text"), str)
    ]
    return "".join(texts)
