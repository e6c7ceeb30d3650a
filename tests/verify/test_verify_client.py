"""The client against a real service and against services that fail in every way: always a verdict by the deadline."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from verify_stub import Reply, accepted, countdown, results, stub

from megatron_rlvr.core import Prompt, RLVRError, Verdict
from megatron_rlvr.verify import VerifierClient, local_service
from megatron_rlvr.verify.client import MAX_CHUNK_CHARS, MAX_CHUNK_ITEMS, _chunks


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
    [("essay", {}, "nobody judges"), ("code", {"mode": "stdio"}, "tests"), ("math", {"answer": 3}, "spec.answer")],
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
                content = json.dumps(accepted(1)[1][0]).encode()
                self.send_response(200)
                self.send_header("content-type", "application/x-ndjson")
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
    "honest": lambda number, body: results(*["infra_error"] * len(body["items"]), detail="no worker"),
    "cut off": lambda number, body: (200, []),
}
REASON = {
    "always full": "HTTP 503: the queue is full",
    "always broken": "HTTP 500: Internal Server Error",
    "mute": "no reply in time|timed out",
    "trickling": "no reply in time",
    "honest": "no worker",
    "cut off": "0 verdicts for 3 responses",
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
        verdicts = ["infra_error" if item["response"] == "?" else "accepted" for item in body["items"]]
        return results(*verdicts, detail="worker died")

    items = [*[countdown("1")] * 3, countdown("?")]
    with stub(answer) as url:
        with VerifierClient(url, deadline_s=5, max_infra_error_share=0.25) as client:
            assert client.verify(items) == [Verdict.ACCEPTED] * 3 + [Verdict.INFRA_ERROR]
        client = VerifierClient(url, deadline_s=5, max_infra_error_share=0.2)
        with client, pytest.raises(RLVRError, match=r"1 of 4 responses .* \(worker died\)"):
            client.verify(items)


@pytest.mark.parametrize(
    "body",
    [
        "<html>hello</html>",
        {"results": [{"verdict": "accepted"}]},
        ["<html>hello</html>\n"],
        [3],
        [{"index": 1, "verdict": "accepted", "detail": ""}],
        [{"index": "0", "verdict": "accepted", "detail": ""}],
        [{"index": 0, "verdict": "splendid", "detail": ""}],
        [{"index": 0, "detail": ""}],
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


def test_what_a_broken_stream_brought_is_kept_and_the_rest_sent_again() -> None:
    sizes: list[int] = []

    def answer(number: int, body: dict[str, Any]) -> Reply:
        sizes.append(len(body["items"]))
        return results("accepted", "wrong_answer") if number == 1 else accepted(len(body["items"]))

    with stub(answer) as url, VerifierClient(url, deadline_s=10, max_infra_error_share=0) as client:
        expected = [Verdict.ACCEPTED, Verdict.WRONG_ANSWER, *[Verdict.ACCEPTED] * 5]
        assert client.verify([countdown("1")] * 7) == expected
    assert sizes == [7, 5]


def test_a_chunk_of_programs_is_small() -> None:
    program = Prompt(id="p", text="", kind="code", spec={}), "pass"
    assert {len(chunk) for chunk in _chunks([program] * 320)} == {32}


@pytest.mark.parametrize("url", ["", " ", ","])
def test_no_address_is_a_sentence(url: str) -> None:
    with pytest.raises(RLVRError, match="names no service"):
        VerifierClient(url, deadline_s=1, max_infra_error_share=0)


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
    chunks = [items[chunk.start : chunk.stop] for chunk in _chunks(items)]
    assert [item for chunk in chunks for item in chunk] == items
    for chunk in chunks:
        assert 1 <= len(chunk) <= MAX_CHUNK_ITEMS
        assert len(chunk) == 1 or sum(len(text) for _, text in chunk) <= MAX_CHUNK_CHARS
