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
import rlvr_sandbox.pool as pool_module
from rlvr_sandbox.api import create_app
from rlvr_sandbox.pool import Pool, UnavailableError
from rlvr_sandbox.process import WorkItem
from sandbox_server import HANG, Server, alive, countdown, cpu_seconds, eventually, math, running

GOOD = countdown("2+5+9", [2, 5, 9], 16)
WRONG = math(r"\boxed{1}", "2")


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
    assert brief.verdicts([GOOD, WRONG, GOOD]) == ["accepted", "wrong_answer", "accepted"]
    assert not any(alive(pid) for pid in stopped[:1])


def test_an_idle_worker_that_dies_is_not_missed(brief: Server) -> None:
    for pid in brief.workers():
        os.kill(pid, signal.SIGKILL)
    assert brief.verdicts([GOOD] * 100) == ["accepted"] * 100


def test_an_item_that_two_workers_die_on_has_no_verdict(patient: Server) -> None:
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
    assert time.monotonic() - started < 2
    assert [result["verdict"] for result in results[:4]] == ["infra_error"] * 4
    assert results[0]["detail"] == "not judged within the deadline of 1 s"
    assert patient.verdicts([GOOD, WRONG], deadline_s=10) == ["accepted", "wrong_answer"]


@pytest.mark.parametrize("how", ["kill", "end of stdin", "terminate"])
def test_no_worker_outlives_the_service(how: str) -> None:
    with running("--item-seconds", "60", "--workers", "1") as server, ThreadPoolExecutor() as threads:
        workers = server.workers()
        assert len(workers) == 1
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


def test_a_full_queue_is_refused_with_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_PENDING", 10)
    hang, good = WorkItem(**HANG), WorkItem(**GOOD)

    async def scenario() -> None:
        async with Pool(workers=1, item_cpu_s=60) as pool:
            waiting = asyncio.create_task(pool.judge([hang] * 10, 1))
            await asyncio.sleep(0.1)
            with pytest.raises(UnavailableError, match="10 items are waiting and 1 more"):
                await pool.judge([good], 1)
            transport = httpx.ASGITransport(create_app(pool))
            async with httpx.AsyncClient(transport=transport, base_url="http://sandbox") as http:
                reply = await http.post("/v1/verify", json={"items": [GOOD], "deadline_s": 1})
            assert reply.status_code == 503
            assert "retry later" in reply.json()["detail"]
            assert {judgement.verdict for judgement in await waiting} == {"infra_error"}
            assert [judgement.verdict for judgement in await pool.judge([good], 20)] == ["accepted"]

    asyncio.run(scenario())


def test_a_broken_pool_ends_the_service_instead_of_leaving_it_mute(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Pool, "_watch", broken)

    async def scenario() -> None:
        async with Pool(workers=1, item_cpu_s=1) as pool:
            await pool.judge([WorkItem(**GOOD)], 30)

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(scenario())
    assert caught.group_contains(ZeroDivisionError)
