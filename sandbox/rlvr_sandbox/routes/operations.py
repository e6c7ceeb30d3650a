"""Routes for whoever operates the service."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from rlvr_sandbox import __version__
from rlvr_sandbox.bench import MAX_PENDING, Bench
from rlvr_sandbox.items import KINDS, MAX_DEADLINE_S, MAX_ITEMS

MODES = ("stdio", "call", "split", "checker", "inproc")


class Health(BaseModel):
    """That the service answers, and what it judges with."""

    status: str
    workers: int
    kinds: list[str]


class Readiness(BaseModel):
    """Whether new items are taken."""

    ready: bool
    pending: int


class Capabilities(BaseModel):
    """What this service can do. ``backend`` is null where it runs no code; ``code`` then says why."""

    version: str
    kinds: list[str]
    backend: str | None
    code: str
    languages: list[str]
    modes: list[str]
    slots: int
    workers: int
    limits: dict[str, float]


def kinds(bench: Bench) -> list[str]:
    """The kinds of items that are judged here."""
    return [kind for kind in KINDS if kind != "code" or not isinstance(bench.code, str)]


def operation_routes(bench: Bench) -> APIRouter:
    """The routes that answer from ``bench``."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz")
    async def healthz() -> Health:
        """Whether the process answers."""
        return Health(status="ok", workers=bench.pool.live_workers, kinds=kinds(bench))

    @router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
    async def readyz() -> Response:
        """Whether new items are taken; 503 while the service starts, drains or stops."""
        readiness = Readiness(ready=bench.ready, pending=bench.pending)
        return JSONResponse(readiness.model_dump(), 200 if bench.ready else 503)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(bench.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/capabilities")
    async def capabilities() -> Capabilities:
        """What this service can do."""
        limits: dict[str, float] = {"items": MAX_ITEMS, "pending": MAX_PENDING, "deadline_s": MAX_DEADLINE_S}
        return Capabilities(
            version=__version__, kinds=kinds(bench), workers=bench.pool.size, limits=limits, **_code(bench)
        )

    return router


def _code(bench: Bench) -> dict[str, Any]:
    lane = bench.code
    if isinstance(lane, str):
        return {"backend": None, "code": lane, "languages": [], "modes": [], "slots": 0}
    executor = lane.executor
    return {
        "backend": executor.name,
        "code": lane.report,
        "languages": list(executor.languages),
        "modes": list(MODES),
        "slots": lane.slots,
    }
