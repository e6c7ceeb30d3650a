"""Services that answer as a test wants them to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_rlvr.core import Prompt

Reply = tuple[int, Any]


def countdown(response: str, target: int = 16) -> tuple[Prompt, str]:
    return Prompt(id="c", text="", kind="countdown", spec={"numbers": [2, 5, 9], "target": target}), response


def results(*verdicts: str, detail: str = "") -> Reply:
    return 200, [{"index": index, "verdict": verdict, "detail": detail} for index, verdict in enumerate(verdicts)]


def accepted(count: int) -> Reply:
    return results(*["accepted"] * count)


@contextmanager
def stub(answer: Callable[[int, dict[str, Any]], Reply]) -> Iterator[str]:
    """A service that answers request number ``n`` with ``answer(n, body)``; a list line by line, bytes for ever."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            status, body = answer(len(requests), requests[-1])
            self.send_response(status)
            self.send_header("content-type", "application/x-ndjson" if isinstance(body, (bytes, list)) else "text/html")
            try:
                if isinstance(body, bytes):
                    self.send_header("content-length", "1000000")
                    self.end_headers()
                    while True:
                        self.wfile.write(body)
                        time.sleep(0.05)
                if isinstance(body, list):
                    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in body)
                else:
                    text = body if isinstance(body, str) else json.dumps(body)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except ConnectionError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
