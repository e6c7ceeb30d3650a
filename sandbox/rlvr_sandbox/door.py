"""The ASGI middleware around all routes: bounds what is held in memory, counts requests."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlvr_sandbox.metrics import Metrics

MAX_BODY_BYTES = 64 << 20
MAX_HELD_BYTES = 512 << 20


class Door:
    """Counts every answer by route and status, and turns requests away while too many bytes are held already."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, busy_status: int) -> None:
        """Wrap ``app``.

        Args:
            app: The application.
            metrics: Where answers are counted.
            busy_status: What routes of other protocols are answered instead of 503.
        """
        self._app = app
        self._metrics = metrics
        self._busy_status = busy_status
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request in, or turn it away."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # An unknown path is no label: there is no end of them.
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        size = _content_length(scope)
        if size > MAX_BODY_BYTES:
            size = 0  # the application refuses it without reading it
        if self._held_bytes + size > MAX_HELD_BYTES:
            sentence = f"requests of {self._held_bytes} bytes are being judged; retry later or add replicas"
            status = 503 if scope["path"].startswith("/v1/") else self._busy_status
            await JSONResponse({"detail": sentence}, status, {"retry-after": "1"})(scope, receive, counted)
            return
        self._held_bytes += size
        try:
            await self._app(scope, receive, counted)
        finally:
            self._held_bytes -= size


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
