"""The service's own routes: batches of items, answered at once or as a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from rlvr_sandbox.bench import Bench, UnavailableError
from rlvr_sandbox.items import (
    PRIORITIES,
    CodeItem,
    Item,
    MathItem,
    MathRequest,
    Refusal,
    StreamedResult,
    VerifyReply,
    VerifyRequest,
    result,
)
from rlvr_sandbox.routes.common import AnyJSONResponse, unless_dropped
from rlvr_sandbox.specs_math import MathSpec
from rlvr_sandbox.verdicts import Judgement, Verdict

NDJSON = "application/x-ndjson"
HEARTBEAT_S = 1.0

_ANSWERED = {
    "description": f"One result for each item, in the order of the request; with `Accept: {NDJSON}` one result a line, "
    "in the order in which they were done, each with its `index`; lines may be empty.",
    "content": {NDJSON: {"schema": StreamedResult.model_json_schema(ref_template="#/components/schemas/{model}")}},
}
# The references of the line's schema are to models that the reply's schema brings along.
_ANSWERED["content"][NDJSON]["schema"].pop("$defs")  # type: ignore[index]


def verify_routes(bench: Bench) -> APIRouter:
    """The routes that answer from ``bench``."""
    router = APIRouter(tags=["verify"])

    @router.post("/v1/verify", response_model=VerifyReply, responses={200: _ANSWERED})
    async def verify(request: Request, body: VerifyRequest) -> Response:
        """Judge items of any kind."""
        return await _answer(bench, request, body.items, body.deadline_s, PRIORITIES[body.priority])

    @router.post("/v1/math", response_model=VerifyReply, responses={200: _ANSWERED})
    async def math(request: Request, body: MathRequest) -> Response:
        """Judge responses to mathematical questions."""
        items = [
            MathItem(kind="math", response=pair.response, spec=MathSpec(answer=pair.gold, **dict(pair.policy)))
            for pair in body.items
        ]
        return await _answer(bench, request, items, body.deadline_s, PRIORITIES[body.priority])

    return router


async def _answer(bench: Bench, request: Request, items: Sequence[Item], deadline_s: float, priority: int) -> Response:
    bench.admit(len(items))
    for index, item in enumerate(items):
        if isinstance(item, CodeItem):
            if isinstance(bench.code, str):
                sentence = f"items[{index}].kind is 'code', but this service does not run code because {bench.code}"
                return AnyJSONResponse(Refusal(detail=sentence).model_dump(), 422)
            break
    if NDJSON in request.headers.get("accept", ""):
        return StreamingResponse(_lines(bench, items, deadline_s, priority), media_type=NDJSON)
    judgements = await unless_dropped(request, bench.judge(items, deadline_s, priority))
    return AnyJSONResponse({"results": [result(judgement) for judgement in judgements]})


async def _lines(bench: Bench, items: Sequence[Item], deadline_s: float, priority: int) -> AsyncIterator[str]:
    """One line for each item, and an empty one now and then, so that a reader can tell silence from death.

    Once the stream has begun there is no other way to say that the service stops than ``infra_error``.
    """
    unanswered = set(range(len(items)))
    try:
        async with aclosing(bench.judged(items, deadline_s, priority, HEARTBEAT_S)) as judged:
            async for answer in judged:
                if answer is None:
                    yield "\n"
                else:
                    unanswered.discard(answer[0])
                    yield _line(*answer)
    except UnavailableError as error:
        for index in sorted(unanswered):
            yield _line(index, Judgement(Verdict.INFRA_ERROR, str(error)))


def _line(index: int, judgement: Judgement) -> str:
    return json.dumps({"index": index, **result(judgement)}) + "\n"
