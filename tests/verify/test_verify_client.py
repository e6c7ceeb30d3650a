"""The client against a real service and against services that fail in every way: always a verdict by the deadline."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.core import Prompt, RLVRError, Verdict
from megatron_rlvr.verify import VerifierClient, local_service
from megatron_rlvr.verify.client import MAX_CHUNK_CHARS, MAX_CHUNK_ITEMS, _chunks

Reply = tuple[int, Any]


def countdown(response: str, target: int = 16) -> tuple[Prompt, str]:
    return Prompt(id="c", text="", kind="countdown", spec={"numbers": [2, 5, 9], "target": target}), response


def accepted(count: int) -> Reply:
    return 200, {"results": [{"verdict": "accepted", "detail": "", "seconds": 0.0}] * count}


@contextmanager
def stub(answer: Callable[[int, dict[str, Any]], Reply]) -> Iterator[str]:
    """A service that answers request number ``n`` with ``answer(n, body)``; bytes are sent one by one for ever."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            status, body = answer(len(requests), requests[-1])
            self.send_response(status)
            try:
                if isinstance(body, bytes):
                    self.send_header("content-length", "1000000")
                    self.end_headers()
                    while True:
                        self.wfile.write(body)
                        time.sleep(0.05)
                content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
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


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with local_service() as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[VerifierClient]:
    with VerifierClient(url, deadline_s=30, max_infra_error_share=0.0) as client:
        yield client


def test_verdicts_have_one_spelling() -> None:
    from rlvr_sandbox.verdicts import Verdict as ServiceVerdict

    assert [verdict.value for verdict in ServiceVerdict] == [verdict.value for verdict in Verdict]


def test_verdicts_come_back_in_order_over_several_chunks(client: VerifierClient) -> None:
    items = [countdown("2+5+9" if index % 7 else "2+", 16 + index % 2) for index in range(3 * MAX_CHUNK_ITEMS + 5)]
    expected = [
        Verdict.NO_ANSWER if index % 7 == 0 else Verdict.WRONG_ANSWER if index % 2 else Verdict.ACCEPTED
        for index in range(len(items))
    ]
    assert client.verify(items) == expected
    assert client.verify([]) == []


def test_kinds_may_be_mixed_and_text_may_be_anything(client: VerifierClient) -> None:
    math = Prompt(id="m", text="", kind="math", spec={"answer": "1/2"})
    items = [
        (math, r"\boxed{0.5}"),
        countdown("2+5+9"),
        (math, "\ud800 \x00 \u2028"),
        (math, "\ud800 \\boxed{\\frac12}"),
    ]
    assert client.verify(items) == [Verdict.ACCEPTED, Verdict.ACCEPTED, Verdict.NO_ANSWER, Verdict.ACCEPTED]


@pytest.mark.parametrize(
    ("kind", "spec", "words"),
    [("code", {}, "does not run code because isolation is not there yet"), ("math", {"answer": 3}, "spec.answer")],
)
def test_a_refusal_is_raised_at_once(client: VerifierClient, kind: str, spec: dict[str, Any], words: str) -> None:
    started = time.monotonic()
    with pytest.raises(RLVRError, match=words):
        client.verify([countdown("1")] * 2000 + [(Prompt(id="x", text="", kind=kind, spec=spec), "1")])
    assert time.monotonic() - started < 5


def test_transient_failures_are_retried() -> None:
    def answer(number: int, body: dict[str, Any]) -> Reply:
        return (503, {"detail": "full"}) if number < 3 else accepted(len(body["items"]))

    with stub(answer) as url, VerifierClient(url, deadline_s=10, max_infra_error_share=0) as client:
        assert client.verify([countdown("1")] * 3) == [Verdict.ACCEPTED] * 3


def test_a_service_that_starts_late_is_waited_for() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    verdicts: list[Verdict] = []
    with VerifierClient(f"http://127.0.0.1:{port}/", deadline_s=10, max_infra_error_share=0) as client:
        thread = threading.Thread(target=lambda: verdicts.extend(client.verify([countdown("1")])))
        thread.start()
        time.sleep(0.3)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.dumps(accepted(1)[1]).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
            server.daemon_threads = True
            server.handle_request()
            thread.join(5)
    assert verdicts == [Verdict.ACCEPTED]


FAILING: dict[str, Callable[[int, dict[str, Any]], Reply]] = {
    "always full": lambda number, body: (503, {"detail": "the queue is full"}),
    "always broken": lambda number, body: (500, "Internal Server Error"),
    "mute": lambda number, body: (time.sleep(3), (200, ""))[1],
    "trickling": lambda number, body: (200, b" "),
    "honest": lambda number, body: (
        200,
        {"results": [{"verdict": "infra_error", "detail": "no worker", "seconds": 0.0}] * len(body["items"])},
    ),
}
REASON = {
    "always full": "HTTP 503: the queue is full",
    "always broken": "HTTP 500: Internal Server Error",
    "mute": "no reply in time|timed out",
    "trickling": "no reply in time",
    "honest": "no worker",
}


@pytest.mark.parametrize("how", FAILING)
def test_every_item_is_answered_by_the_deadline(how: str) -> None:
    with stub(FAILING[how]) as url:
        with VerifierClient(url, deadline_s=1, max_infra_error_share=1.0) as tolerant:
            started = time.monotonic()
            assert tolerant.verify([countdown("1")] * 600) == [Verdict.INFRA_ERROR] * 600
            assert time.monotonic() - started < 1.3
        with VerifierClient(url, deadline_s=0.5, max_infra_error_share=0.99) as strict:
            with pytest.raises(RLVRError, match=REASON[how]) as caught:
                strict.verify([countdown("1")] * 3)
            sentence = str(caught.value)
            assert url in sentence
            assert "3 of 3 responses" in sentence
            assert "resume the run with the same command" in sentence


def test_the_tolerated_share_is_inclusive() -> None:
    def answer(number: int, body: dict[str, Any]) -> Reply:
        results = [{"verdict": "accepted", "detail": "", "seconds": 0.0}] * 3
        return 200, {"results": [*results, {"verdict": "infra_error", "detail": "worker died", "seconds": 0.0}]}

    with stub(answer) as url:
        with VerifierClient(url, deadline_s=5, max_infra_error_share=0.25) as client:
            assert client.verify([countdown("1")] * 4) == [Verdict.ACCEPTED] * 3 + [Verdict.INFRA_ERROR]
        client = VerifierClient(url, deadline_s=5, max_infra_error_share=0.2)
        with client, pytest.raises(RLVRError, match=r"1 of 4 responses .* \(worker died\)"):
            client.verify([countdown("1")] * 4)


@pytest.mark.parametrize(
    "body",
    [
        "<html>hello</html>",
        [],
        {"results": 3},
        {"results": [{"verdict": "accepted"}] * 2},
        {"results": [{"verdict": "splendid", "detail": "", "seconds": 0}]},
        {"results": [{"detail": ""}]},
    ],
    ids=str,
)
def test_a_200_reply_is_not_proof(body: Any) -> None:
    with (
        stub(lambda number, request: (200, body)) as url,
        VerifierClient(url, deadline_s=5, max_infra_error_share=1.0) as client,
        pytest.raises(RLVRError, match="is not this version's verifier service"),
    ):
        client.verify([countdown("1")])


def test_the_service_is_told_an_earlier_deadline() -> None:
    deadlines: list[float] = []

    def answer(number: int, body: dict[str, Any]) -> Reply:
        deadlines.append(body["deadline_s"])
        return accepted(len(body["items"]))

    with stub(answer) as url, VerifierClient(url, deadline_s=20, max_infra_error_share=0) as client:
        client.verify([countdown("1")])
    assert 18 < deadlines[0] < 19.1


@given(st.lists(st.integers(0, MAX_CHUNK_CHARS // 3), min_size=1, max_size=30), st.integers(0, 3))
def test_chunks_are_bounded_and_complete(lengths: list[int], repeats: int) -> None:
    class Text(str):
        """A text that only claims its length."""

        def __new__(cls, length: int) -> Text:
            text = super().__new__(cls)
            text.length = length
            return text

        def __len__(self) -> int:
            return self.length

    prompt = Prompt(id="", text="", kind="math", spec={})
    items = [(prompt, Text(length)) for length in lengths] + [(prompt, Text(1))] * (repeats * MAX_CHUNK_ITEMS)
    chunks = list(_chunks(items))
    assert [item for chunk in chunks for item in chunk] == items
    for chunk in chunks:
        assert 1 <= len(chunk) <= MAX_CHUNK_ITEMS
        assert len(chunk) == 1 or sum(len(text) for _, text in chunk) <= MAX_CHUNK_CHARS
