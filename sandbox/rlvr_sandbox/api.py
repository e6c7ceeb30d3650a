"""The HTTP face of the service: all routes, and what goes wrong as one sentence with a status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

from rlvr_sandbox import __version__
from rlvr_sandbox.bench import Bench, FullError, NoCodeError, UnavailableError
from rlvr_sandbox.door import MAX_BODY_BYTES, Door
from rlvr_sandbox.items import KINDS
from rlvr_sandbox.routes.common import (
    OWN_REFUSALS,
    AnyJSONResponse,
    BadRequestError,
    DroppedError,
    NoVerdictError,
    compatible_refusals,
)
from rlvr_sandbox.routes.fusion import fusion_routes
from rlvr_sandbox.routes.operations import operation_routes
from rlvr_sandbox.routes.rewards import reward_routes
from rlvr_sandbox.routes.submissions import submission_routes
from rlvr_sandbox.routes.verify import verify_routes

DROPPED_STATUS = 499
_RETRY = {"retry-after": "1"}


def _place(location: Sequence[int | str]) -> str:
    """``items[3].spec.answer`` from pydantic's path, which also names the members of unions."""
    steps = [
        step
        for position, step in enumerate(location)
        if step != "body"
        and not (position == 3 and step in KINDS)
        and not (isinstance(step, str) and step[:1].isupper())
    ]
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".") or "the body"


def _sentence(error: Mapping[str, Any]) -> str:
    """What is wrong with a request, in one sentence."""
    place = _place(error["loc"])
    if error["type"] == "union_tag_invalid":
        known = " and ".join([", ".join(KINDS[:-1]), KINDS[-1]])
        return f"{place}.kind is {str(error['ctx']['tag'])[:60]!r}, which nobody judges; send only the kinds {known}"
    message = error["msg"].removeprefix("Value error, ")[:160]
    return f"{place[:60]} is refused ({message}); send what the README of rlvr-sandbox describes"


def _refusal(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    return AnyJSONResponse({"detail": sentence}, status, headers)


def create_app(bench: Bench, busy_status: int = 504) -> FastAPI:
    """The application that answers from ``bench``, which the caller starts and stops.

    Args:
        bench: Where items are judged.
        busy_status: What routes of other protocols answer where there is no verdict; verl retries 504 only.
    """
    app = FastAPI(title="rlvr-sandbox", version=__version__, max_body_size=MAX_BODY_BYTES)
    app.include_router(verify_routes(bench), responses=OWN_REFUSALS)
    for router in (fusion_routes(bench), submission_routes(bench), reward_routes(bench)):
        app.include_router(router, responses=compatible_refusals(busy_status))
    app.include_router(operation_routes(bench))
    app.add_middleware(Door, metrics=bench.metrics, busy_status=busy_status)
    _add_refusals(app, busy_status)
    return app


def _add_refusals(app: FastAPI, busy_status: int) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _refusal(422, _sentence(error.errors()[0]))

    @app.exception_handler(BadRequestError)
    async def bad(_: Request, error: BadRequestError) -> Response:
        return _refusal(422, str(error))

    @app.exception_handler(UnavailableError)
    async def unavailable(request: Request, error: UnavailableError) -> Response:
        own = 429 if isinstance(error, FullError) else 503
        return _refusal(own if request.url.path.startswith("/v1/") else busy_status, str(error), _RETRY)

    @app.exception_handler(NoVerdictError)
    async def no_verdict(_: Request, error: NoVerdictError) -> Response:
        return _refusal(busy_status, str(error), _RETRY)

    @app.exception_handler(NoCodeError)
    async def no_code(_: Request, error: NoCodeError) -> Response:
        return _refusal(501, str(error))

    @app.exception_handler(DroppedError)
    async def dropped(_: Request, __: DroppedError) -> Response:
        return Response(status_code=DROPPED_STATUS)
