"""Programs through the service: verdicts of every mode, turns by priority, deadlines, dropped clients, failures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter
from rlvr_sandbox.bench import Bench
from rlvr_sandbox.code_lane import CodeLane
from rlvr_sandbox.execution import Ending, Limits, Outcome, Program, Session
from rlvr_sandbox.items import Item, TaggedItem
from rlvr_sandbox.metrics import Metrics
from rlvr_sandbox.pool import Pool
from rlvr_sandbox.turns import Turns
from sandbox_server import Server, code, countdown, descendants, eventually, program, running_code

CALL = {"mode": "call", "entry_point": "f", "tests": [{"args": [3], "expected": 9}]}
SPLIT = {"mode": "split", "entry_point": "f", "test_code": "def check(candidate):\n    assert candidate(3) == 9\n"}
CHECKER = {
    "mode": "checker",
    "tests": [{"stdin": "9", "stdout": "3 6"}],
    "checker": "import sys\na, b = map(int, open('output.txt').read().split())\n"
    "sys.exit(a + b != int(open('input.txt').read()))\n",
}
SQUARE, CUBE = "```python\ndef f(x):\n    return x * x\n```", "```python\ndef f(x):\n    return x ** 3\n```"


class Fake:
    """An executor without a sandbox: a program's source says in JSON how long it takes and how it ends."""

    name = "ns"
    languages = ("python",)

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.order: list[str] = []

    async def run(self, program: Program, limits: Limits, stdin: bytes = b"") -> Outcome:
        plan = json.loads(program.source)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(plan.get("seconds", 0))
        finally:
            self.running -= 1
        self.order.append(plan.get("name", ""))
        if plan.get("raises") and (plan["raises"] == "always" or self.order.count(plan["name"]) < 2):
            raise ZeroDivisionError("no slot")
        return Outcome(Ending.EXITED, 0, None, b"out", b"", 0.01, 0.01)

    @asynccontextmanager
    async def open(self, program: Program, limits: Limits, guest: str) -> AsyncIterator[Session]:
        raise NotImplementedError
        yield

    async def close(self) -> None:
        pass


def planned(expected: str = "out", **plan: Any) -> Item:
    return TypeAdapter(TaggedItem).validate_python(program(json.dumps(plan), "", expected))


@asynccontextmanager
async def fake_bench(slots: int = 1) -> AsyncIterator[tuple[Bench, Fake]]:
    metrics, fake = Metrics(), Fake()
    pool = Pool(workers=1, item_cpu_s=1, metrics=metrics)
    yield Bench(pool, CodeLane(fake, slots=slots, metrics=metrics, report=""), metrics), fake


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_code() as server:
        yield server


def test_every_mode_has_both_verdicts(server: Server) -> None:
    inproc = {"mode": "inproc", "test_code": "assert f(3) == 9\n"}
    items = [
        *[program("print(int(input()) ** 2)", "3", "9"), program("print(int(input()) ** 3)", "3", "9")],
        *[code(response, spec) for spec in (CALL, SPLIT, inproc) for response in (SQUARE, CUBE)],
        *[code("```python\nprint(4, 5)\n```", CHECKER), code("```python\nprint(4, 6)\n```", CHECKER)],
    ]
    results = server.verify(items)
    assert [result["verdict"] for result in results] == ["accepted", "wrong_answer"] * 5
    isolated = server.http.get("/v1/capabilities").json()["backend"] != "none"
    trusts = ["isolated"] * 4 + ["isolated"] * 2 + ["inproc"] * 2 + ["isolated"] * 2
    assert [result["trust"] for result in results] == (trusts if isolated else ["unsafe"] * 10)


def test_how_programs_fail_has_words(server: Server) -> None:
    items = [
        program("while True: pass", "", "1", cpu_s=0.3),
        program("x = 'y' * 10**9\nprint(len(x))", "", "1000000000", memory_mb=64),
        program("while True: print('y' * 1000)", "", "1", output_kb=16),
        program("raise ValueError", "", "1"),
        program("print(", "", "1"),
        code("I do not know.", CALL),
    ]
    verdicts = ["time_limit", "memory_limit", "output_limit", "runtime_error", ("compile_error", "runtime_error")]
    for verdict, expected in zip(server.verdicts(items), [*verdicts, "no_answer"], strict=True):
        assert verdict in expected


def test_bad_specifications_are_refused_in_one_sentence(server: Server) -> None:
    for change, place in (
        ({"tests": []}, "items[1].spec "),
        ({"mode": "guess"}, "items[1].spec.mode "),
        ({"entry_point": "f()"}, "items[1].spec.entry_point "),
        ({"tests": [{"args": 3, "expected": 1}]}, "items[1].spec.tests[0]"),
        ({"limits": {"cpu_s": -1}}, "items[1].spec.limits.cpu_s "),
    ):
        item = code(SQUARE, {**CALL, **change})
        body = {"items": [countdown("1", [1], 1), item], "deadline_s": 1}
        reply = server.http.post("/v1/verify", json=body)
        assert reply.status_code == 422
        assert reply.json()["detail"].startswith(place)
        assert "\n" not in reply.json()["detail"]


def test_the_deadline_is_kept_and_frees_the_slots(server: Server) -> None:
    started = time.monotonic()
    results = server.verify([program(f"import time\ntime.sleep(60)  # {n}", "", "1") for n in range(8)], deadline_s=1)
    assert time.monotonic() - started < 3
    assert {result["verdict"] for result in results} == {"infra_error"}
    started = time.monotonic()
    assert server.verdicts([program("print(1)", "", "1")] * 4) == ["accepted"] * 4
    assert time.monotonic() - started < 5


def test_a_client_that_goes_away_frees_the_slots(server: Server) -> None:
    sleepers = [program(f"import time\ntime.sleep(50)  # {n}", "", "1") for n in range(6)]
    for accept in ("application/json", "application/x-ndjson"):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                server.http.base_url.join("/v1/verify"),
                json={"items": sleepers, "deadline_s": 60},
                headers={"accept": accept},
                timeout=0.5,
                trust_env=False,
            ).read()
        assert eventually(lambda: server.http.get("/readyz").json()["pending"] == 0, within_s=3)
    assert server.verdicts([program("print(1)", "", "1")] * 4, deadline_s=10) == ["accepted"] * 4


def test_kills_and_runs_are_counted(server: Server) -> None:
    kills, runs = server.metric("rlvr_sandbox_kills_total"), server.metric("rlvr_sandbox_runs_total")
    server.verify([program("while True: pass", "", "1", cpu_s=0.2), program("print(2)", "", "2")])
    assert server.metric("rlvr_sandbox_kills_total") == kills + 1
    assert server.metric("rlvr_sandbox_runs_total") == runs + 2
    assert server.metric("rlvr_sandbox_backend_info") == 1
    assert server.metric("rlvr_sandbox_run_cpu_seconds_count") >= 2


def test_no_program_outlives_its_run(server: Server) -> None:
    before = set(descendants(server.process.pid))
    server.verify([program("import os\nos.fork()\nwhile True: pass", "", "1", cpu_s=0.3, processes=4)] * 2)
    assert eventually(lambda: set(descendants(server.process.pid)) <= before, within_s=3)


def test_no_more_than_the_slots_run_at_once() -> None:
    async def scenario() -> None:
        async with fake_bench(slots=3) as (bench, fake):
            judgements = await bench.judge([planned(seconds=0.01) for _ in range(20)], 10)
            assert {judgement.verdict for judgement in judgements} == {"accepted"}
            assert fake.most == 3

    asyncio.run(scenario())


def test_evaluation_waits_for_training() -> None:
    async def scenario() -> list[str]:
        async with fake_bench() as (bench, fake):
            judging = [
                asyncio.create_task(bench.judge([planned(name=name, seconds=0.01)], 10, priority))
                for name, priority in (("first", 1), ("eval", 1), ("train", 0), ("late eval", 1), ("late train", 0))
            ]
            await asyncio.gather(*judging)
            return fake.order

    assert asyncio.run(scenario()) == ["first", "train", "late train", "eval", "late eval"]


def test_a_failing_executor_is_tried_again_and_then_no_verdict() -> None:
    async def scenario() -> None:
        async with fake_bench() as (bench, _):
            once, always, good = await bench.judge(
                [planned(name="a", raises="once"), planned(name="b", raises="always"), planned(name="c")], 10
            )
            assert (once.verdict, always.verdict, good.verdict) == ("accepted", "infra_error", "accepted")
            assert "ZeroDivisionError: no slot" in always.detail
            assert bench.pending == 0

    asyncio.run(scenario())


def test_a_stuck_executor_does_not_hold_up_the_answer() -> None:
    class Stuck(Fake):
        async def run(self, program: Program, limits: Limits, stdin: bytes = b"") -> Outcome:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                await asyncio.sleep(3)  # a slot that does not let go
                raise
            raise AssertionError

    async def scenario() -> None:
        metrics = Metrics()
        lane = CodeLane(Stuck(), slots=1, metrics=metrics, report="")
        bench = Bench(Pool(workers=1, item_cpu_s=1, metrics=metrics), lane, metrics)
        started = time.monotonic()
        judgements = await bench.judge([planned(), planned()], 0.2)
        assert time.monotonic() - started < 0.5
        assert {judgement.verdict for judgement in judgements} == {"infra_error"}
        assert bench.pending == 0

    asyncio.run(scenario())


def test_a_cancelled_waiter_gives_its_turn_away() -> None:
    async def scenario() -> list[str]:
        turns, order = Turns(1), list[str]()

        async def take(name: str, priority: int) -> None:
            async with turns.turn(priority):
                order.append(name)
                await asyncio.sleep(0.01)

        tasks = {name: asyncio.create_task(take(name, 0)) for name in ("holder", "called", "waiting", "last")}
        await asyncio.sleep(0.005)
        tasks["waiting"].cancel()
        await tasks["holder"]
        tasks["called"].cancel()  # its turn was handed to it already
        await asyncio.wait(tasks.values())
        await asyncio.wait_for(take("later", 0), 1)
        return order

    assert asyncio.run(scenario()) in (["holder", "last", "later"], ["holder", "called", "last", "later"])
