"""The HTTP face of the service: what a request may hold, and the two routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from rlvr_sandbox import __version__
from rlvr_sandbox.pool import Pool, UnavailableError
from rlvr_sandbox.process import WorkItem
from rlvr_sandbox.verdicts import Verdict

KINDS = ("countdown", "math")
MAX_ITEMS = 4_096
MAX_BODY_BYTES = 64 << 20
MAX_DEADLINE_S = 3_600.0
MAX_INTEGER = 10**15


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class MathSpec(_Strict):
    """What the ``math`` checker compares with: the reference answer, as text or LaTeX."""

    answer: Annotated[str, Field(min_length=1, max_length=2_000)]


class MathItem(_Strict):
    """A response to a mathematical question."""

    kind: Literal["math"]
    response: str
    spec: MathSpec


class CountdownSpec(_Strict):
    """A Countdown game: the numbers to use and the target to reach."""

    numbers: Annotated[list[Annotated[int, Field(ge=0, le=MAX_INTEGER)]], Field(min_length=1, max_length=16)]
    target: Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]


class CountdownItem(_Strict):
    """A response to a Countdown game."""

    kind: Literal["countdown"]
    response: str
    spec: CountdownSpec


class VerifyRequest(_Strict):
    """A batch of items and the seconds within which every one of them is answered."""

    items: Annotated[
        list[Annotated[MathItem | CountdownItem, Field(discriminator="kind")]], Field(max_length=MAX_ITEMS)
    ]
    deadline_s: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S)]


class Result(BaseModel):
    """The answer to one item; ``seconds`` is the wall time spent on it."""

    verdict: Verdict
    detail: str
    seconds: float


class VerifyReply(BaseModel):
    """One result for each item, in the order of the request."""

    results: list[Result]


def _place(location: Sequence[int | str]) -> str:
    """``items[3].spec.answer`` from pydantic's path, which also names the member of the union."""
    steps = [step for position, step in enumerate(location) if not (position == 3 and step in KINDS) and step != "body"]
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".") or "the body"


def _sentence(error: dict[str, Any]) -> str:
    """What is wrong with a request, in one sentence."""
    place = _place(error["loc"])
    if error["type"] == "union_tag_invalid":
        tag = error["ctx"]["tag"]
        if tag == "code":
            return (
                f"{place}.kind is 'code', but this build does not run code because isolation is not there yet; "
                f"send only the kinds {' and '.join(KINDS)}"
            )
        return f"{place}.kind is {str(tag)[:60]!r}, which no checker judges; send only the kinds {' and '.join(KINDS)}"
    return f"{place} is refused ({error['msg']}); send what the README of rlvr-sandbox describes"


def _refusal(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status)


def create_app(pool: Pool) -> FastAPI:
    """The application that answers from ``pool``, which the caller starts and stops."""
    app = FastAPI(title="rlvr-sandbox", version=__version__, max_body_size=MAX_BODY_BYTES)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _refusal(422, _sentence(error.errors()[0]))

    @app.exception_handler(UnavailableError)
    async def unavailable(_: Request, error: UnavailableError) -> Response:
        return _refusal(503, str(error))

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "workers": pool.live_workers, "kinds": list(KINDS)}

    @app.post("/v1/verify", response_model=VerifyReply)
    async def verify(request: VerifyRequest) -> Response:
        items = [WorkItem(item.kind, item.response, item.spec.model_dump()) for item in request.items]
        judgements = await pool.judge(items, request.deadline_s)
        return JSONResponse({"results": [judgement._asdict() for judgement in judgements]})

    return app
