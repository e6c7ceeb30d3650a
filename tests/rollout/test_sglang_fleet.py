"""The fleet: what a failing server may cost, and that nothing it sends becomes a wrong sample."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scripted_sglang import DropConnection, HoldingServer, ScriptedServer, serve
from sglang_server import BASE, disk_sync, installation, scratch, shared_server

from megatron_rlvr.core import RLVRError, SamplingParams
from megatron_rlvr.rollout import load_tokenizer
from megatron_rlvr.rollout.resync import Resync, TensorTransport
from megatron_rlvr.rollout.sglang.client import SGLangClient, SGLangError
from megatron_rlvr.rollout.sglang.engines import EngineState, FleetEngine
from megatron_rlvr.rollout.sglang.fleet import SGLangFleet
from megatron_rlvr.rollout.sglang.launch import FleetSettings, sglang_fleet
from megatron_rlvr.rollout.sglang.router import RouterClient, sglang_router
from megatron_rlvr.rollout.sglang.server import Launched

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=2, samples_per_prompt=3, seed=17)
PROMPTS = ["259:07;", "4", "48:", "7", "99:"]

Script = Callable[[Any], tuple[int, Any]]


@pytest.fixture
def pair() -> Iterator[tuple[ScriptedServer, ScriptedServer]]:
    with ExitStack() as stack:
        yield stack.enter_context(serve(ScriptedServer())), stack.enter_context(serve(ScriptedServer()))


def fleet_of(*servers: ScriptedServer, **settings: int) -> SGLangFleet:
    """A fleet that takes version 5 for resynced."""
    engines = [FleetEngine(SGLangClient(server.url, timeout_s=0.5, generate_timeout_s=0.5)) for server in servers]
    fleet = SGLangFleet(BASE, load_tokenizer(BASE), engines, lambda fleet, tensors, version: None, **settings)
    fleet.resync([], version=5)
    return fleet


def failing(status: int) -> Script:
    return lambda body: (status, {"error": {"message": "scripted"}})


def drop(body: Any) -> tuple[int, Any]:
    raise DropConnection


def hang(body: Any) -> tuple[int, Any]:
    time.sleep(1.5)
    return 200, {}


@pytest.mark.parametrize("fault", [failing(500), failing(503), drop, hang], ids=["500", "503", "reset", "hang"])
def test_a_failing_server_is_left_out_and_its_requests_are_replaced(
    pair: tuple[ScriptedServer, ScriptedServer], fault: Script
) -> None:
    bad, good = pair
    fleet = fleet_of(bad, good)
    bad.scripts |= {"/generate": fault, "/health_generate": fault}
    samples = fleet.generate(PROMPTS, SAMPLING)
    assert [sample.group for sample in samples] == [group for group in range(5) for _ in range(3)]
    assert [engine.state for engine in fleet.engines] == [EngineState.OUT, EngineState.SERVING]
    assert "/health_generate" in fleet.engines[0].why
    seeds = [entry["sampling_seed"] for body in good.calls("/generate") for entry in body["sampling_params"]]
    assert len(seeds) == len(set(seeds)) == 15  # each sample once, whoever was asked first


def test_one_failed_request_costs_a_healthy_server_nothing(pair: tuple[ScriptedServer, ScriptedServer]) -> None:
    answers = iter([500] + [200] * 99)
    server = pair[0]
    server.scripts["/generate"] = lambda body: (next(answers), [server.sample() for _ in body["input_ids"]])
    fleet = fleet_of(server)
    assert len(fleet.generate(PROMPTS, SAMPLING)) == 15
    assert fleet.engines[0].state is EngineState.SERVING


WRONG_META: list[dict[str, Any]] = [
    {"weight_versions": [{"version": "4", "start": 0, "end": 2}]},
    {"weight_versions": [{"version": "6", "start": 0, "end": 2}]},
    {"weight_versions": [{"version": "default", "start": 0, "end": 2}]},
    {"weight_versions": [{"version": "5", "start": 0, "end": 1}]},
    {"weight_versions": [{"version": "5", "start": 1, "end": 2}]},
    {"finish_reason": {"type": "abort", "message": "paused"}},
    {"finish_reason": None},
    {"output_token_logprobs": [[-0.5, 4, None], [-0.25, 6, None]]},
    {"output_token_logprobs": [[-0.5, 4, None]]},
    {"output_token_logprobs": [[-0.5, 4, None], [None, 5, None]]},
]


@pytest.mark.parametrize("meta", WRONG_META, ids=range(len(WRONG_META)))
def test_no_unusable_reply_becomes_a_sample(pair: tuple[ScriptedServer, ScriptedServer], meta: dict[str, Any]) -> None:
    bad, good = pair
    fleet = fleet_of(bad, good)
    bad.scripts["/generate"] = lambda body: (200, [bad.sample(**meta) for _ in body["input_ids"]])
    samples = fleet.generate(PROMPTS, SAMPLING)
    assert [sample.version_spans for sample in samples] == [[(5, 0, 2)]] * 15
    assert [sample.logprobs for sample in samples] == [[-0.5, -0.25]] * 15
    assert len(good.calls("/generate")) == 5
    with pytest.raises(RLVRError, match="failed 5 times"):
        fleet_of(bad).generate(PROMPTS[:1], SAMPLING)


def test_a_server_with_old_weights_is_left_out(pair: tuple[ScriptedServer, ScriptedServer]) -> None:
    stale, good = pair
    fleet = fleet_of(stale, good)
    stale.version = "4"
    assert {sample.weight_version for sample in fleet.generate(PROMPTS, SAMPLING)} == {5}
    assert fleet.engines[0].why == "it announces weights of version '4' and not 5"


def test_a_request_at_fault_is_not_tried_elsewhere(pair: tuple[ScriptedServer, ScriptedServer]) -> None:
    for server in pair:
        server.scripts["/generate"] = failing(400)
    fleet = fleet_of(*pair)
    with pytest.raises(SGLangError, match="HTTP 400 to /generate: scripted"):
        fleet.generate(PROMPTS[:1], SAMPLING)
    assert sum(len(server.calls("/generate")) for server in pair) == 1
    assert len(fleet.serving()) == 2


def test_the_run_stops_in_words_below_the_minimum(pair: tuple[ScriptedServer, ScriptedServer]) -> None:
    fleet = fleet_of(*pair, minimum=2)
    pair[0].scripts |= {"/generate": drop, "/health_generate": drop}
    with pytest.raises(RLVRError, match=rf"1 of 2 SGLang engines serve, fewer than the 2 needed \({pair[0].url}: "):
        fleet.generate(PROMPTS, SAMPLING)
    fleet.readmit(fleet.engines[0])
    assert len(fleet.serving()) == 2
    with pytest.raises(RLVRError, match=r"0 of 0 SGLang engines serve, fewer than the 1 needed \(no more were given\)"):
        fleet_of()


def test_concurrency_is_bounded(pair: tuple[ScriptedServer, ScriptedServer]) -> None:
    lock, running, most = threading.Lock(), {0: 0, 1: 0}, {0: 0, 1: 0}

    def script(number: int) -> Script:
        def answer(body: Any) -> tuple[int, Any]:
            with lock:
                running[number] += 1
                most[number] = max(most[number], running[number])
            time.sleep(0.03)
            with lock:
                running[number] -= 1
            return 200, [pair[number].sample() for _ in body["input_ids"]]

        return answer

    for number, server in enumerate(pair):
        server.scripts["/generate"] = script(number)
    assert len(fleet_of(*pair, requests_per_engine=3).generate(PROMPTS * 6, SAMPLING)) == 90
    assert most == {0: 3, 1: 3}


def test_a_token_that_the_model_does_not_have_stays_here(pair: tuple[ScriptedServer, ScriptedServer]) -> None:
    """Sent, it would end the whole server (IndexError in the scheduler)."""
    fleet = fleet_of(pair[0])
    fleet._tokenizer.add_tokens(["@"])
    fleet._vocabulary = len(fleet._tokenizer) - 1
    with pytest.raises(RLVRError, match=r"prompt 1 of 2 has token \d+, but the model's vocabulary ends at \d+; use"):
        fleet.generate(["48:", "4@"], SAMPLING)
    assert not pair[0].calls("/generate")


def test_servers_that_cannot_retract_are_refused_in_words(pair: tuple[ScriptedServer, ScriptedServer]) -> None:
    del pair[1].paths["/begin_weight_update"]  # as before SGLang 0.5.21
    fleet = fleet_of(*pair)
    sync = Resync(BASE, TensorTransport(), pause="retract")
    with pytest.raises(
        RLVRError, match=f"rollout.partial=true needs SGLang 0.5.21 or newer, and {pair[1].url} is older"
    ):
        sync(fleet, [], 6)
    assert not pair[0].calls("/pause_generation")


def test_attached_and_behind_a_router() -> None:
    """On the real server: the router's samples are the server's, and one that is out gets nothing."""
    server, _ = shared_server()
    weights = load_file(BASE / "model.safetensors")
    settings = FleetSettings(log_directory=scratch(), urls=(server.url,))
    front = sglang_router(installation().python, scratch() / "router.log")
    with sglang_fleet(BASE, load_tokenizer(BASE), disk_sync, settings) as plain:
        router = RouterClient(front.url)
        try:
            front.start()
            front.wait_ready(router, time.monotonic() + 60.0)
            fleet = SGLangFleet(BASE, load_tokenizer(BASE), plain.engines, disk_sync, router=router)
            fleet.resync(weights.items(), version=21)
            samples = fleet.generate(PROMPTS, SAMPLING)
            assert [sample.group for sample in samples] == [group for group in range(5) for _ in range(3)]
            assert {sample.weight_version for sample in samples} == {21}
            assert torch.tensor([sample.logprobs[0] for sample in samples]).isfinite().all()
            fleet.deregister(fleet.engines[0], "the test says so")
            assert router.workers() == {}
            with pytest.raises(RLVRError, match=r"0 of 1 .* the test says so"):
                fleet.generate(PROMPTS, SAMPLING)
            fleet.readmit(fleet.engines[0])
            assert len(fleet.generate(PROMPTS, SAMPLING)) == 15
        finally:
            router.close()
            front.close()


class SlowRouter(RouterClient):
    """Sends everything to its first server, and for a while after it was told to let that go."""

    def __init__(self, *servers: ScriptedServer) -> None:
        super().__init__("http://127.0.0.1:1")
        self.to = [SGLangClient(server.url, timeout_s=0.5) for server in servers]

    def add(self, url: str) -> None:
        pass

    def remove(self, url: str) -> None:
        time.sleep(0.5)
        self.to = [client for client in self.to if client.url != url]

    def generate(self, payload: dict[str, Any], *others: Any, **named: Any) -> list[dict[str, Any]]:
        return self.to[0].generate(payload)


def test_nobody_sends_again_before_the_router_has_let_a_dead_server_go(
    pair: tuple[ScriptedServer, ScriptedServer],
) -> None:
    dead, good = pair
    dead.scripts |= {"/generate": drop, "/health_generate": drop}
    engines = [FleetEngine(client) for client in SlowRouter(*pair).to]
    fleet = SGLangFleet(BASE, load_tokenizer(BASE), engines, lambda *_: None, router=SlowRouter(*pair))
    fleet.resync([], version=5)
    assert len(fleet.generate(PROMPTS, SAMPLING)) == 15
    assert len(dead.calls("/generate")) <= 15
    assert len(good.calls("/generate")) == 15


def test_two_servers_behind_the_real_router() -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(serve(HoldingServer(lambda prompt: False))) for _ in range(2)]
        front = sglang_router(installation().python, scratch() / "router_of_two.log")
        stack.callback(front.close)
        router = RouterClient(front.url)
        stack.callback(router.close)
        front.start()
        front.wait_ready(router, time.monotonic() + 60.0)
        engines = [FleetEngine(SGLangClient(server.url, timeout_s=2.0)) for server in servers]
        fleet = SGLangFleet(BASE, load_tokenizer(BASE), engines, lambda *_: None, router=router)
        fleet.resync([], version=5)
        fallen, good = servers
        serial: set[float] = set()

        def sent(wanted: int | None = None) -> tuple[int, int]:
            """How many requests each of the two gets for ten prompts, once all samples have come."""
            before = [len(server.calls("/generate")) for server in servers]
            samples = fleet.generate(PROMPTS * 2, SAMPLING, wanted)
            assert len(samples) == 3 * (wanted or 10)
            serial.update(new := {sample.logprobs[0] for sample in samples})
            assert len(new) == len(samples)
            after = [len(server.calls("/generate")) for server in servers]
            return after[0] - before[0], after[1] - before[1]

        assert sent() == (15, 15)
        fleet.deregister(engines[0], "the test says so")
        assert sent() == (0, 30)
        fleet.readmit(engines[0])
        assert sent() == (15, 15)

        held = load_tokenizer(BASE).encode(PROMPTS[0])
        for server in servers:
            server.holds = lambda prompt: prompt == held
        sent(wanted=8)
        assert len({rid for server in servers for rid in server.aborted}) == 6
        for server in servers:
            server.await_running(0)
            server.release()

        fallen.scripts |= dict.fromkeys(("/generate", "/health_generate", "/health", "/model_info"), drop)
        attempts, answered = sent()
        assert attempts > 0
        assert answered == 30
        assert [engine.state for engine in engines] == [EngineState.OUT, EngineState.SERVING]
        assert list(router.workers()) == [good.url]
        assert sent() == (0, 30)
        assert len(serial) == 3 * (10 + 10 + 10 + 8 + 10 + 10)


def test_the_log_of_a_server_of_ours_that_died_is_quoted(
    pair: tuple[ScriptedServer, ScriptedServer], tmp_path: Path
) -> None:
    bad, good = pair
    fleet = fleet_of(bad, good)
    process = Launched(
        Path(sys.executable), ["-c", "raise MemoryError('no room for the cache')"], {}, tmp_path / "0.log"
    )
    process.start()
    fleet.engines[0].process = process  # it is still alive, if only to its supervisor
    bad.scripts |= {"/generate": drop, "/health_generate": drop}
    assert len(fleet.generate(PROMPTS, SAMPLING)) == 15
    process.close()
    assert re.search(
        r"/health_generate: .*; its log .*/0\.log ends with: .*no room for the cache", fleet.engines[0].why
    )
    fleet.deregister(fleet.engines[1], "the test says so")
    with pytest.raises(RLVRError, match=r"0 of 2 .* MemoryError: no room for the cache; .*: the test says so\)"):
        fleet.generate(PROMPTS, SAMPLING)
