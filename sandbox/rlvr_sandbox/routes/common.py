"""What the routes share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse

from rlvr_sandbox.items import Refusal

T = TypeVar("T")

_Responses = dict[int | str, dict[str, Any]]

_LARGE: dict[str, Any] = {"model": Refusal, "description": "The body is larger than 64 MiB."}
_BAD: dict[str, Any] = {"model": Refusal, "description": "The request cannot be judged as it is."}

OWN_REFUSALS: _Responses = {
    413: _LARGE,
    422: _BAD,
    429: {"model": Refusal, "description": "Too many unanswered items; retry after the seconds of `Retry-After`."},
    503: {"model": Refusal, "description": "The service is stopping or holds too much; retry after `Retry-After`."},
}


def compatible_refusals(busy_status: int) -> _Responses:
    """The refusals of the routes that follow somebody else's protocol."""
    return {
        413: _LARGE,
        422: _BAD,
        501: {"model": Refusal, "description": "This service does not run code."},
        busy_status: {"model": Refusal, "description": "No verdict: too busy, stopping, or the sandbox failed. Retry."},
    }


class AnyJSONResponse(JSONResponse):
    """JSON that carries whatever a request brought, lone surrogates and NaN included."""

    def render(self, content: Any) -> bytes:
        """``content`` in ASCII."""
        return json.dumps(content, separators=(",", ":")).encode()


class BadRequestError(Exception):
    """The request cannot be judged as it is; the text is one sentence."""


class NoVerdictError(Exception):
    """The sandbox failed on a request whose protocol has no word for that; the text says how."""


class DroppedError(Exception):
    """The client has gone; nobody will read the answer."""


async def unless_dropped(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns; it is cancelled when the client goes away meanwhile.

    Raises:
        DroppedError: If the client went away.
    """
    working = asyncio.ensure_future(work)
    dropped = asyncio.create_task(_dropped(request))
    try:
        await asyncio.wait({working, dropped}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise DroppedError
        return working.result()
    finally:
        working.cancel()
        dropped.cancel()


async def _dropped(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
