"""A stand-in for SGLang's HTTP side whose every answer a test can script. It proves nothing about SGLang itself."""

from __future__ import annotations

import itertools
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


_serial = itertools.count(1)


class HoldingServer(ScriptedServer):
    """Keeps the samples of prompts that it ``holds`` until they are aborted or released, as SGLang 0.5.23 does.

    A request is answered once all of its samples have ended, an abort strikes every running id that begins with the
    one it names if that one is known, and no two samples have the same log-probs.
    """

    def __init__(self, holds: Callable[[list[int]], bool] = lambda prompt: True) -> None:
        super().__init__()
        self.holds = holds
        self.changed = threading.Condition()
        self.running: dict[str, str] = {}  # how each sample ended; empty while it has not
        self.aborted: list[str] = []
        self.missed: list[str] = []  # aborts of what the server does not know, or does not run because it is paused
        self.paused = ""
        self.resets = False  # whether a pause drops the connections of what runs

    def await_running(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.running) == count, 10.0), self.running

    def release(self) -> None:
        """Finish all, and whatever comes later at once."""
        self.holds = lambda prompt: False
        self.paused = ""
        self._end("", "length")

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path in self.scripts:
            return super().answer(path, body)
        match path:
            case "/generate":
                self.seen.append((path, body))
                return self._generate(body)
            case "/abort_request":
                rid = body["rid"]
                known = rid in self.running and not self.paused
                (self.aborted if known else self.missed).append(rid)
                if known:
                    self._end(rid, "abort")
            case "/pause_generation":
                self.paused = body["mode"]
                if self.paused == "abort":
                    self._end("", "reset" if self.resets else "abort")
            case "/continue_generation":
                self.paused = ""
                self._end("\0", "")
            case "/update_weight_version":
                self.version = body["new_version"]
        return super().answer(path, body)

    def _end(self, prefix: str, how: str) -> None:
        with self.changed:
            for rid, ended in self.running.items():
                if rid.startswith(prefix) and not ended:
                    self.running[rid] = how
            self.changed.notify_all()

    def _generate(self, body: Any) -> tuple[int, Any]:
        many = isinstance(body["sampling_params"], list)
        count = len(body["sampling_params"]) if many else 1
        rids = [f"{body['rid']}_{copy}" for copy in range(count)] if many else [body["rid"]]
        prompt = body["input_ids"][0] if many else body["input_ids"]
        with self.changed:
            assert not self.running.keys() & set(rids)
            self.changed.wait_for(lambda: not self.paused)
            self.running |= dict.fromkeys(rids, "" if self.holds(prompt) else "length")
            self.changed.notify_all()
            self.changed.wait_for(lambda: all(self.running[rid] for rid in rids))
            ends = [self.running.pop(rid) for rid in rids]
            self.changed.notify_all()
        if "reset" in ends:
            raise DropConnection
        return 200, [self._sample(end) for end in ends]

    def _sample(self, end: str) -> dict[str, Any]:
        entries = [[-1e-6 * next(_serial), token, None] for token in (4, 5)]
        return self.sample(finish_reason={"type": end, "length": 2}, output_token_logprobs=entries)


class _Listener(ThreadingHTTPServer):
    request_queue_size = 128  # with the usual 5, some of many connections at once wait a second


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

    http = _Listener(("127.0.0.1", 0), Handler)
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
