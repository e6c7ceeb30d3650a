"""The HTTP face of a running service: order, refusals, bounds, speed."""

from __future__ import annotations

import asyncio
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
from rlvr_sandbox.api import create_app
from rlvr_sandbox.bench import Bench
from rlvr_sandbox.checkers import CHECKERS
from rlvr_sandbox.items import KINDS
from rlvr_sandbox.metrics import Metrics
from rlvr_sandbox.pool import Pool
from sandbox_server import HANG, Server, countdown, math, running

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
    assert set(KINDS) == {*CHECKERS, "code"}
    health = server.http.get("/healthz").json()
    assert health["status"] == "ok"
    assert health["workers"] == 2
    assert {"countdown", "math", "reasoning_gym"} <= set(health["kinds"]) <= set(KINDS)
    assert server.http.get("/readyz").json() == {"ready": True, "pending": 0}


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


def test_code_is_refused_in_words_where_there_is_no_isolation() -> None:
    reason = "no backend holds here (ns: blocked, landlock: absent); use a newer kernel"

    async def scenario() -> None:
        metrics = Metrics()
        bench = Bench(Pool(workers=1, item_cpu_s=1, metrics=metrics), reason, metrics)
        transport = httpx.ASGITransport(create_app(bench))
        async with httpx.AsyncClient(transport=transport, base_url="http://sandbox") as http:
            code = {"kind": "code", "response": "1", "spec": {"mode": "stdio", "tests": [{"stdin": "", "stdout": "1"}]}}
            reply = await http.post("/v1/verify", json={"items": [GOOD, code], "deadline_s": 1})
            assert reply.status_code == 422
            expected = f"items[1].kind is 'code', but this service does not run code because {reason}"
            assert reply.json() == {"detail": expected}
            reply = await http.post("/run_code", json={"code": "1", "language": "python"})
            assert reply.status_code == 501
            assert reply.json() == {"detail": f"this service does not run code because {reason}"}
            reply = await http.post("/rm", json={"response": "1", "label": {"kind": "code", "spec": code["spec"]}})
            assert reply.status_code == 501
            capabilities = (await http.get("/v1/capabilities")).json()
            assert (capabilities["backend"], capabilities["code"]) == (None, reason)
            assert "code" not in (await http.get("/healthz")).json()["kinds"]

    asyncio.run(scenario())


def test_results_are_streamed_as_they_are_done(server: Server) -> None:
    items = [*[GOOD] * 70, math(r"\boxed{1}", "2"), HANG]
    accept = {"accept": "application/x-ndjson"}
    with server.http.stream("POST", "/v1/verify", json={"items": items, "deadline_s": 2}, headers=accept) as reply:
        assert reply.headers["content-type"].startswith("application/x-ndjson")
        results = [json.loads(line) for line in reply.iter_lines() if line]
    assert sorted(result["index"] for result in results) == list(range(72))
    assert results[-1]["index"] == 71
    assert results[-1]["verdict"] == "infra_error"
    verdicts = {result["index"]: result["verdict"] for result in results[:-1]}
    assert verdicts == {**dict.fromkeys(range(70), "accepted"), 70: "wrong_answer"}


def test_math_has_a_door_of_its_own(server: Server) -> None:
    pairs = [
        {"gold": "1/2", "response": r"\boxed{0.5}"},
        {"gold": "0.5", "response": r"\boxed{50\%}", "policy": {"percent": "value"}},
        {"gold": "50", "response": r"\boxed{50\%}", "policy": {"percent": "value"}},
    ]
    reply = server.http.post("/v1/math", json={"items": pairs, "deadline_s": 20})
    assert [result["verdict"] for result in reply.json()["results"]] == ["accepted", "accepted", "wrong_answer"]
    reply = server.http.post("/v1/math", json={"items": [{**pairs[0], "policy": {"percents": 1}}], "deadline_s": 1})
    assert reply.status_code == 422
    assert reply.json()["detail"].startswith("items[0].policy.percents ")


def test_the_same_item_is_judged_once(server: Server) -> None:
    item = math(r"\boxed{123456/3}", "41152")
    hits = server.metric("rlvr_sandbox_cache_hits_total")
    assert server.verify([item])[0]["verdict"] == "accepted"
    assert server.verify([item, item])[1]["verdict"] == "accepted"
    assert server.metric("rlvr_sandbox_cache_hits_total") == hits + 2


def test_metrics_count_verdicts_and_requests(server: Server) -> None:
    before = server.metric("rlvr_sandbox_verdicts_total"), server.metric("rlvr_sandbox_requests_total")
    server.verify([GOOD, math("1", "2")])
    assert server.metric("rlvr_sandbox_verdicts_total") == before[0] + 2
    assert server.metric("rlvr_sandbox_requests_total") >= before[1] + 2
    assert server.metric("rlvr_sandbox_queue_items") == 0
    assert server.http.get("/nowhere").status_code == 404
    assert 'route="other",status="404"' in server.http.get("/metrics").text


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
    for options, words in (
        (["--port", taken], "choose another --port"),
        (["--workers", "0"], "--workers is 0"),
        (["--drain-seconds", "nan"], "--drain-seconds is nan"),
        (["--backend", "none"], "only if both say so"),
        (["--unsafe"], "only if both say so"),
    ):
        command = [sys.executable, "-m", "rlvr_sandbox", "serve", *options]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert ended.returncode == 1
        assert ended.stdout == ""
        assert ended.stderr.startswith("rlvr-sandbox: ")
        assert words in ended.stderr
        assert ended.stderr.count("\n") == 1


def test_documentation_of_the_api_is_served(server: Server) -> None:
    schema = httpx.get(server.http.base_url.join("/openapi.json"), trust_env=False).json()
    own = {"/v1/verify", "/v1/math", "/v1/capabilities", "/healthz", "/readyz", "/metrics"}
    assert set(schema["paths"]) == {*own, "/run_code", "/submit", "/common_evaluate_batch", "/rm", "/verify"}
