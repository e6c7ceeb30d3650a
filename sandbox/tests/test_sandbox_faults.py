"""What happens when items hang, workers die and the service is killed: every item still gets its honest verdict."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter
from rlvr_sandbox import bench as bench_module
from rlvr_sandbox.api import create_app
from rlvr_sandbox.bench import Bench, FullError
from rlvr_sandbox.items import Item, TaggedItem
from rlvr_sandbox.metrics import Metrics
from rlvr_sandbox.pool import Pool
from sandbox_server import HANG, Server, alive, countdown, cpu_seconds, descendants, eventually, math, running

GOOD = countdown("2+5+9", [2, 5, 9], 16)
WRONG = math(r"\boxed{1}", "2")


def item(fields: dict[str, Any]) -> Item:
    return TypeAdapter(TaggedItem).validate_python(fields)


@pytest.fixture(scope="module")
def brief() -> Iterator[Server]:
    """A service whose items may take half a second."""
    with running("--item-seconds", "0.5") as server:
        yield server


@pytest.fixture(scope="module")
def patient() -> Iterator[Server]:
    """A service whose items may take longer than any test."""
    with running("--item-seconds", "60") as server:
        yield server


def kill_busy_workers(server: Server, times: int, until: Future[Any]) -> None:
    """Kill -9 whichever worker computes, ``times`` times or until the request is answered."""
    killed = 0
    while killed < times and not until.done():
        before = {pid: cpu_seconds(pid) for pid in server.workers()}
        time.sleep(0.5)
        for pid, cpu_s in before.items():
            if alive(pid) and cpu_seconds(pid) - cpu_s > 0.25:
                os.kill(pid, signal.SIGKILL)
                killed += 1
                break


def test_a_hang_costs_its_own_item_only(brief: Server) -> None:
    before = set(brief.workers())
    items = [GOOD, WRONG] * 10 + [HANG] + [WRONG, GOOD] * 10 + [HANG, GOOD]
    results = brief.verify(items)
    expected = ["accepted", "wrong_answer"] * 10 + ["time_limit"] + ["wrong_answer", "accepted"] * 10
    assert [result["verdict"] for result in results] == [*expected, "time_limit", "accepted"]
    assert results[20]["detail"] == "more than 0.5 s of CPU time"
    assert eventually(lambda: brief.http.get("/healthz").json()["workers"] == 2, within_s=10)
    assert len(before - set(brief.workers())) >= 1
    assert not any(alive(pid) for pid in before - set(brief.workers()))


def test_a_stopped_worker_is_replaced_and_its_item_tried_again(brief: Server) -> None:
    stopped = brief.workers()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    fresh = [countdown("3+4", [3, 4], 7), countdown("3+4", [3, 4], 8), countdown("3*4", [3, 4], 12)]
    assert brief.verdicts(fresh) == ["accepted", "wrong_answer", "accepted"]
    assert not all(alive(pid) for pid in stopped)


def test_an_idle_worker_that_dies_is_not_missed(brief: Server) -> None:
    for pid in brief.workers():
        os.kill(pid, signal.SIGKILL)
    fresh = [countdown(f"1+{number}", [1, number], 1 + number) for number in range(100)]
    assert brief.verdicts(fresh) == ["accepted"] * 100


def test_an_item_that_two_workers_die_on_has_no_verdict(patient: Server) -> None:
    patient.verify([GOOD, WRONG])  # known from now on, so that the item that hangs is the only one to be shot at
    with ThreadPoolExecutor() as threads:
        reply = threads.submit(patient.verify, [GOOD] * 20 + [HANG] + [WRONG] * 20)
        kill_busy_workers(patient, 20, until=reply)
        results = reply.result()
    verdicts = [result["verdict"] for result in results]
    assert verdicts == ["accepted"] * 20 + ["infra_error"] + ["wrong_answer"] * 20
    assert "2 workers died" in results[20]["detail"]


def test_an_item_gets_a_second_worker(brief: Server) -> None:
    # Judged for 0.5 s of CPU time by the first worker, killed at once, then judged in full by the second.
    with ThreadPoolExecutor() as threads:
        reply = threads.submit(brief.verify, [HANG, GOOD])
        time.sleep(0.2)
        for pid in brief.workers():
            os.kill(pid, signal.SIGKILL)
        assert [result["verdict"] for result in reply.result()] == ["time_limit", "accepted"]


def test_the_deadline_is_kept_and_frees_the_workers(patient: Server) -> None:
    started = time.monotonic()
    results = patient.verify([HANG, HANG, HANG, HANG, GOOD], deadline_s=1)
    assert time.monotonic() - started < 3
    assert [result["verdict"] for result in results[:4]] == ["infra_error"] * 4
    assert results[0]["detail"] == "not judged within the deadline of 1 s"
    assert patient.verdicts([GOOD, WRONG], deadline_s=10) == ["accepted", "wrong_answer"]


@pytest.mark.parametrize("how", ["kill", "end of stdin", "terminate"])
def test_no_worker_outlives_the_service(how: str) -> None:
    with (
        running("--item-seconds", "60", "--workers", "1", "--drain-seconds", "0.5") as server,
        ThreadPoolExecutor() as threads,
    ):
        assert len(server.workers()) == 1
        workers = descendants(server.process.pid)
        busy = threads.submit(server.verify, [HANG], 60)
        time.sleep(0.3)
        if how == "end of stdin":
            assert server.process.stdin is not None
            server.process.stdin.close()
            server.process.stdin = None
        else:
            server.process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
        assert eventually(lambda: server.process.poll() is not None, within_s=4)
        assert eventually(lambda: not any(alive(pid) for pid in workers), within_s=2)
        if how == "kill":
            assert isinstance(busy.exception(), httpx.TransportError)
        else:
            assert "the service is stopping" in str(busy.exception())


def test_requests_at_hand_are_drained_and_new_ones_refused() -> None:
    with running("--item-seconds", "2", "--workers", "1") as server, ThreadPoolExecutor() as threads:
        busy = threads.submit(server.verify, [HANG, GOOD], 60)
        assert eventually(lambda: server.http.get("/readyz").json()["pending"] == 2, within_s=5)
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: server.http.get("/readyz").status_code == 503, within_s=1)
        reply = server.http.post("/v1/verify", json={"items": [GOOD], "deadline_s": 1})
        assert reply.status_code == 503
        assert "the service is stopping" in reply.json()["detail"]
        assert server.http.post("/rm", json={"response": "1", "label": "1"}).status_code == 504
        assert [result["verdict"] for result in busy.result()] == ["time_limit", "accepted"]
        assert server.process.wait(5) == 0


def test_a_full_queue_is_refused_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "MAX_PENDING", 10)
    hang, good = item(HANG), item(GOOD)

    async def scenario() -> None:
        async with Pool(workers=1, item_cpu_s=60, metrics=Metrics()) as pool:
            bench = Bench(pool, "there is no isolation", Metrics())
            waiting = asyncio.create_task(bench.judge([hang] * 10, 1))
            await asyncio.sleep(0.1)
            with pytest.raises(FullError, match="10 items are waiting and 1 more"):
                await bench.judge([good], 1)
            transport = httpx.ASGITransport(create_app(bench))
            async with httpx.AsyncClient(transport=transport, base_url="http://sandbox") as http:
                reply = await http.post("/v1/verify", json={"items": [GOOD], "deadline_s": 1})
                busy = await http.post("/rm", json={"response": "1", "label": "1"})
            assert (reply.status_code, busy.status_code) == (429, 504)
            assert reply.headers["retry-after"] == busy.headers["retry-after"] == "1"
            assert "retry later" in reply.json()["detail"]
            assert {judgement.verdict for judgement in await waiting} == {"infra_error"}
            assert [judgement.verdict for judgement in await bench.judge([good], 20)] == ["accepted"]

    asyncio.run(scenario())


def test_evaluation_waits_for_training() -> None:
    async def scenario() -> list[str]:
        order: list[str] = []

        async def judge(bench: Bench, name: str, answer: str, priority: int) -> None:
            await bench.judge([item(math(rf"\boxed{{{answer}}}", "7"))], 30, priority)
            order.append(name)

        async with Pool(workers=1, item_cpu_s=0.5, metrics=Metrics()) as pool:
            bench = Bench(pool, "there is no isolation", Metrics())
            busy = asyncio.create_task(bench.judge([item(HANG)], 30))
            await asyncio.sleep(0.1)
            async with asyncio.TaskGroup() as group:
                for number in range(3):
                    group.create_task(judge(bench, "eval", str(number), 1))
                await asyncio.sleep(0)
                for number in range(3, 6):
                    group.create_task(judge(bench, "train", str(number), 0))
            await busy
        return order

    assert asyncio.run(scenario()) == ["train"] * 3 + ["eval"] * 3


def test_a_broken_pool_ends_the_service_instead_of_leaving_it_mute(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Pool, "_watch", broken)

    async def scenario() -> None:
        async with Pool(workers=1, item_cpu_s=1, metrics=Metrics()) as pool:
            await Bench(pool, "there is no isolation", Metrics()).judge([item(GOOD)], 30)

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(scenario())
    assert caught.group_contains(ZeroDivisionError)
