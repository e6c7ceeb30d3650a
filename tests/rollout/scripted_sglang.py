"""A stand-in for SGLang's HTTP side whose every answer a test can script. It proves nothing about SGLang itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NEEDED = (
    *("generate", "health_generate", "pause_generation", "continue_generation", "flush_cache"),
    *("update_weights_from_disk", "update_weights_from_tensor", "update_weights_from_distributed"),
    *("destroy_weights_update_group", "update_weight_version", "weights_checker", "begin_weight_update"),
)


class DropConnection(BaseException):
    """Raised by a script to close the connection without a reply."""


class ScriptedServer:
    """Answers like one healthy server of ``version``, save where ``scripts`` say otherwise."""

    def __init__(self, version: str = "5") -> None:
        self.version = version
        self.paths = {f"/{name}": {} for name in NEEDED}
        self.scripts: dict[str, Callable[[Any], tuple[int, Any]]] = {}
        self.seen: list[tuple[str, Any]] = []
        self.url = ""

    def calls(self, path: str) -> list[Any]:
        return [body for seen, body in self.seen if seen == path]

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        path = path.partition("?")[0]
        self.seen.append((path, body))
        if path in self.scripts:
            return self.scripts[path](body)
        match path:
            case "/openapi.json":
                return 200, {"paths": self.paths}
            case "/model_info":
                return 200, {"weight_version": self.version}
            case "/server_info":
                return 200, {"tp_size": 2, "version": "0.5.23"}
            case "/generate":
                count = len(body["input_ids"]) if isinstance(body["sampling_params"], list) else 1
                return 200, [self.sample() for _ in range(count)]
        return 200, {"success": True, "message": "done"}

    def sample(self, **meta: Any) -> dict[str, Any]:
        usual = {
            "finish_reason": {"type": "length", "length": 2},
            "output_token_logprobs": [[-0.5, 4, None], [-0.25, 5, None]],
            "weight_versions": [{"version": self.version, "start": 0, "end": 2}],
        }
        return {"text": "", "output_ids": [4, 5], "meta_info": usual | meta}


@contextmanager
def serve(server: ScriptedServer) -> Iterator[ScriptedServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            try:
                status, content = server.answer(self.path, json.loads(raw) if raw else None)
            except DropConnection:
                self.close_connection = True
                self.connection.close()
                return
            reply = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_DELETE = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.handle_error = lambda *args: None  # type: ignore[method-assign]  # the dropped connections
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
