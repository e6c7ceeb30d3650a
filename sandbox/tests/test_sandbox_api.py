"""The HTTP face of a running service: order, refusals, bounds, speed."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
from rlvr_sandbox.api import KINDS
from rlvr_sandbox.checkers import CHECKERS
from sandbox_server import Server, countdown, math, running

GOOD = countdown("2+5+9", [2, 5, 9], 16)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


def refusal(server: Server, body: object, status: int = 422) -> str:
    reply = server.http.post("/v1/verify", json=body)
    assert reply.status_code == status
    assert list(reply.json()) == ["detail"]
    return reply.json()["detail"]


def test_health(server: Server) -> None:
    assert set(KINDS) == set(CHECKERS)
    assert server.http.get("/healthz").json() == {"status": "ok", "workers": 2, "kinds": ["countdown", "math"]}


def test_order_is_that_of_the_request(server: Server) -> None:
    items = [
        math(f"\\boxed{{{index}}}", str(index if index % 3 else -1))
        if index % 2
        else countdown(f"{index}+1", [index, 1], index + index % 3)
        for index in range(700)
    ]
    expected = ["accepted" if (index % 3 if index % 2 else index % 3 == 1) else "wrong_answer" for index in range(700)]
    assert server.verdicts(items) == expected


def test_an_empty_batch_is_answered(server: Server) -> None:
    assert server.verify([]) == []


def test_results_carry_reason_and_time(server: Server) -> None:
    (result,) = server.verify([countdown("2+5*9", [2, 5, 9], 16)])
    assert result["detail"] == "equals 47 instead of 16"
    assert 0 < result["seconds"] < 1


def test_code_is_refused_because_isolation_is_missing(server: Server) -> None:
    detail = refusal(server, {"items": [GOOD, {"kind": "code", "response": "pass", "spec": {}}], "deadline_s": 1})
    assert detail.startswith("items[1].kind is 'code'")
    assert "does not run code because isolation is not there yet" in detail


@pytest.mark.parametrize(
    ("item", "place"),
    [
        ({"kind": "essay", "response": "", "spec": {}}, "items[1].kind is 'essay'"),
        ({"response": "", "spec": {}}, "items[1] "),
        ({"kind": "math", "response": "1"}, "items[1].spec "),
        ({"kind": "math", "response": "1", "spec": {"answer": 1}}, "items[1].spec.answer "),
        ({"kind": "math", "response": "1", "spec": {"answer": ""}}, "items[1].spec.answer "),
        ({"kind": "math", "response": "1", "spec": {"answer": "1", "tolerance": 3}}, "items[1].spec.tolerance "),
        ({"kind": "math", "response": None, "spec": {"answer": "1"}}, "items[1].response "),
        (countdown("1", [], 1), "items[1].spec.numbers "),
        (countdown("1", [1, -2], 1), "items[1].spec.numbers[1] "),
        (countdown("1", [True], 1), "items[1].spec.numbers[0] "),
        (countdown("1", [1], 10**30), "items[1].spec.target "),
        ("text", "items[1] "),
    ],
)
def test_bad_items_are_refused_in_one_sentence(server: Server, item: object, place: str) -> None:
    detail = refusal(server, {"items": [GOOD, item], "deadline_s": 1})
    assert detail.startswith(place)
    assert "\n" not in detail
    assert len(detail) < 250


@pytest.mark.parametrize("deadline_s", [0, -1, 1e9, "soon", None])
def test_bad_deadlines_are_refused(server: Server, deadline_s: object) -> None:
    assert refusal(server, {"items": [GOOD], "deadline_s": deadline_s}).startswith("deadline_s ")


def test_bad_bodies_are_refused(server: Server) -> None:
    assert refusal(server, []).startswith("the body ")
    assert refusal(server, {"items": [GOOD] * 4097, "deadline_s": 1}).startswith("items ")
    headers = {"content-type": "application/json"}
    for content in (b"", b"{", b'{"items": [' * 2000, b"\xff\xfe", b'{"items": NaN}'):
        assert server.http.post("/v1/verify", content=content, headers=headers).status_code in (400, 422)
    surrogate = b'{"items":[{"kind":"math","response":"\\ud800","spec":{"answer":"1"}}],"deadline_s":1}'
    assert server.http.post("/v1/verify", content=surrogate, headers=headers).status_code in (200, 422)
    endless = (b"x" * (1 << 20) for _ in range(80))
    assert server.http.post("/v1/verify", content=endless, headers=headers).status_code == 413
    assert server.verdicts([GOOD]) == ["accepted"]


def test_a_huge_body_is_refused_before_it_is_read(server: Server) -> None:
    connection = http.client.HTTPConnection(server.http.base_url.host, server.http.base_url.port, timeout=5)
    connection.putrequest("POST", "/v1/verify")
    connection.putheader("content-length", str(1 << 40))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_an_overlong_response_is_a_verdict(server: Server) -> None:
    items = [GOOD, countdown("2" * ((1 << 20) + 1), [2], 2), math("x" * (1 << 20) + r"\boxed{1}", "1"), GOOD]
    assert server.verdicts(items) == ["accepted", "output_limit", "output_limit", "accepted"]


def test_a_batch_of_512_is_cheap(server: Server) -> None:
    best_s = 1e9
    for _ in range(5):
        started = time.perf_counter()
        assert server.verdicts([GOOD] * 512) == ["accepted"] * 512
        best_s = min(best_s, time.perf_counter() - started)
    assert best_s < 0.15


def test_connections_are_answered_without_delay(server: Server) -> None:
    def seconds() -> float:
        started = time.perf_counter()
        server.verdicts([GOOD])
        return time.perf_counter() - started

    assert sorted(seconds() for _ in range(20))[10] < 0.035  # 40 ms and more when small packets wait for an ACK


def test_a_service_that_cannot_start_says_why_in_one_sentence(server: Server) -> None:
    taken = str(server.http.base_url.port)
    for options, words in ((["--port", taken], "choose another --port"), (["--workers", "0"], "--workers is 0")):
        command = [sys.executable, "-m", "rlvr_sandbox", "serve", *options]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert ended.returncode == 1
        assert ended.stdout == ""
        assert ended.stderr.startswith("rlvr-sandbox: ")
        assert words in ended.stderr
        assert ended.stderr.count("\n") == 1


def test_documentation_of_the_api_is_served(server: Server) -> None:
    schema = httpx.get(server.http.base_url.join("/openapi.json"), trust_env=False).json()
    assert {"/v1/verify", "/healthz"} == set(schema["paths"])
