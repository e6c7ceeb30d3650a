"""More prompts than are wanted, and a generation that others end: what is aborted, and that nothing else suffers."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scripted_sglang import HoldingServer, ScriptedServer, serve
from sglang_server import BASE, shared_fleet, shared_server

from megatron_rlvr.core import FinishReason, RLVRError, Sample, SamplingParams
from megatron_rlvr.rollout import NamedTensors, load_tokenizer
from megatron_rlvr.rollout.resync import Resync, TensorTransport
from megatron_rlvr.rollout.sglang import fleet as fleet_module
from megatron_rlvr.rollout.sglang.batch import Batch, requests_for
from megatron_rlvr.rollout.sglang.client import SGLangClient
from megatron_rlvr.rollout.sglang.engines import EngineState, FleetEngine
from megatron_rlvr.rollout.sglang.fleet import ATTEMPTS, SGLangFleet

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=2, samples_per_prompt=3, seed=17)
PROMPTS = ["259:07;", "4", "48:", "7", "99:", "111:03;1+1"]
IDS = [load_tokenizer(BASE).encode(prompt) for prompt in PROMPTS]
TEXT = dict(zip(map(tuple, IDS), PROMPTS, strict=True))

Sync = Callable[[SGLangFleet, NamedTensors, int], None]


def held(*positions: int) -> Callable[[list[int]], bool]:
    return lambda prompt: prompt in [IDS[position] for position in positions]


def take_over(fleet: SGLangFleet, tensors: NamedTensors, version: int) -> None:
    """Ends what runs, as a resync in pause mode abort does."""
    for engine in fleet.engines:
        engine.client.pause("abort")
    for engine in fleet.engines:
        engine.client.update_weight_version(version)
        engine.client.continue_generation()


def fleet_of(*servers: ScriptedServer, sync: Sync = take_over, **settings: int) -> SGLangFleet:
    engines = [FleetEngine(SGLangClient(server.url, timeout_s=2.0, generate_timeout_s=60.0)) for server in servers]
    fleet = SGLangFleet(BASE, load_tokenizer(BASE), engines, sync, **settings)
    fleet.resync([], version=5)
    return fleet


@pytest.fixture
def pair() -> Iterator[tuple[HoldingServer, HoldingServer]]:
    with ExitStack() as stack:
        servers = stack.enter_context(serve(HoldingServer())), stack.enter_context(serve(HoldingServer()))
        yield servers
        for server in servers:
            server.release()


@pytest.fixture
def background(pair: tuple[HoldingServer, HoldingServer]) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool
        for server in pair:  # a test that failed leaves threads that wait for them
            server.release()


def assert_left(fleet: SGLangFleet, *, threads: int = 0) -> None:
    """All slots are free, no server is suspected, and no more threads than those of other calls are there."""
    assert [engine.load for engine in fleet.engines] == [0] * len(fleet.engines)
    assert {engine.state for engine in fleet.engines} == {EngineState.SERVING}
    deadline = time.monotonic() + 1.0  # a thread that freed its slot ends a moment later
    while (left := [thread for thread in threading.enumerate() if thread.name == "rollout"]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert len(left) == threads


def groups(samples: Sequence[Sample]) -> list[int]:
    return [sample.group for sample in samples]


def test_the_first_whole_groups_are_returned_and_the_others_aborted(pair: tuple[HoldingServer, HoldingServer]) -> None:
    for server in pair:
        server.holds = held(1, 4)
    fleet = fleet_of(*pair)
    samples = fleet.generate(PROMPTS, SAMPLING, wanted=4)
    assert groups(samples) == [group for group in (0, 2, 3, 5) for _ in range(3)]
    assert [sample.prompt_ids for sample in samples] == [IDS[sample.group] for sample in samples]
    assert_left(fleet)
    for server in pair:
        server.await_running(0)
        assert not server.calls("/health_generate")
        assert not any("abort_all" in body for body in server.calls("/abort_request"))
    sent = [body for server in pair for body in server.calls("/generate")]
    stragglers = [body["rid"] for body in sent if held(1, 4)(body["input_ids"][0])]
    aborted = sorted(rid for server in pair for rid in server.aborted)
    assert len(stragglers) == 2
    assert aborted == sorted(f"{rid}_{copy}" for rid in stragglers for copy in range(3))
    assert len({body["rid"] for body in sent}) == len(sent) == 6
    assert groups(fleet.generate(PROMPTS[:1], SAMPLING, wanted=1)) == [0, 0, 0]


def test_what_was_not_sent_never_is(pair: tuple[HoldingServer, HoldingServer]) -> None:
    server = pair[0]
    server.holds = held()
    fleet = fleet_of(server, requests_per_engine=1)
    assert groups(fleet.generate(PROMPTS, SAMPLING, wanted=2)) == [0, 0, 0, 1, 1, 1]
    assert_left(fleet)
    assert len(server.calls("/generate")) == 2
    assert not server.calls("/abort_request")


def test_other_threads_requests_go_on(
    pair: tuple[HoldingServer, HoldingServer], background: ThreadPoolExecutor
) -> None:
    """An evaluation waits on the same servers, one request of 12 samples on each; servers abort by prefix."""
    for server in pair:
        server.holds = held(0, 1)
    fleet = fleet_of(*pair)
    many = SamplingParams(temperature=1.0, max_new_tokens=2, samples_per_prompt=12, seed=3)
    evaluation = background.submit(fleet.generate, PROMPTS[:2], many)
    for server in pair:
        server.await_running(12)
    assert groups(fleet.generate(PROMPTS, SAMPLING, wanted=4)) == [group for group in (2, 3, 4, 5) for _ in range(3)]
    for server in pair:
        server.await_running(12)
        server.release()
    assert groups(evaluation.result(10.0)) == [group for group in (0, 1) for _ in range(12)]
    assert_left(fleet)


def test_a_number_that_cannot_be_wanted(pair: tuple[HoldingServer, HoldingServer]) -> None:
    fleet = fleet_of(pair[0])
    for wanted in (0, 7, -1):
        with pytest.raises(ValueError, match=f"{wanted} of 6 prompts"):
            fleet.generate(PROMPTS, SAMPLING, wanted=wanted)


@given(st.permutations(range(12)), st.integers(1, 4))
def test_single_samples_make_whole_groups(order: list[int], wanted: int) -> None:
    """Behind a router every sample comes by itself; those of a group that is not whole, and late ones, are dropped."""
    requests = requests_for([[7], [8], [9], [10]], 3, together=False)
    batch = Batch(threading.Condition(), requests, wanted)
    come: Counter[int] = Counter()
    first: list[int] = []
    for index in order:
        request = requests[index]
        ids = [request.group, request.copies.start]
        batch.deliver(request, [Sample(request.group, request.prompt_ids, ids, [0.0], "", FinishReason.STOP, 5)])
        come[request.group] += 1
        first += [request.group] * (come[request.group] == 3)
        assert batch.over == (len(first) >= wanted)
    expected = [[group, copy] for group in sorted(first[:wanted]) for copy in range(3)]
    assert [sample.response_ids for sample in batch.result()] == expected


@settings(max_examples=15)
@given(st.data())
def test_no_sample_arrives_twice_and_groups_are_whole(data: st.DataObject) -> None:
    stragglers = data.draw(st.sets(st.integers(0, 5), max_size=4))
    wanted = data.draw(st.integers(1, 6 - len(stragglers)))
    copies = data.draw(st.integers(1, 3))
    errors = data.draw(st.integers(0, ATTEMPTS - 1))
    with serve(HoldingServer(held(*stragglers))) as one, serve(HoldingServer(held(*stragglers))) as other:
        fail = iter([True] * errors)
        answer = one._generate

        def fallible(body: Any) -> tuple[int, Any]:
            return (500, {}) if next(fail, False) else answer(body)

        one.scripts["/generate"] = fallible
        fleet = fleet_of(one, other, requests_per_engine=len(stragglers) + data.draw(st.integers(1, 3)))
        sampling = SamplingParams(temperature=1.0, max_new_tokens=2, samples_per_prompt=copies, seed=5)
        samples = fleet.generate(PROMPTS, sampling, wanted=wanted)
        assert_left(fleet)
        for server in (one, other):
            server.await_running(0)
            server.release()
    whole = Counter(groups(samples))
    assert groups(samples) == sorted(groups(samples))
    assert set(whole.values()) == {copies}
    assert len(whole) == wanted
    assert not whole.keys() & stragglers
    assert len({tuple(sample.logprobs) for sample in samples}) == len(samples)


@pytest.mark.parametrize("resets", [False, True], ids=["aborted", "reset"])
def test_resyncs_cost_no_attempts(
    pair: tuple[HoldingServer, HoldingServer], background: ThreadPoolExecutor, resets: bool
) -> None:
    fleet = fleet_of(*pair)
    running = background.submit(fleet.generate, PROMPTS[:4], SAMPLING)
    resyncs = ATTEMPTS + 2
    for version in range(6, 6 + resyncs):
        for server in pair:
            server.await_running(6)
            server.resets = resets
        fleet.resync([], version)
    for server in pair:
        server.await_running(6)
        server.release()
    samples = running.result(10.0)
    assert groups(samples) == [group for group in range(4) for _ in range(3)]
    assert {sample.weight_version for sample in samples} == {5 + resyncs}
    assert_left(fleet)
    sent = [body["rid"] for server in pair for body in server.calls("/generate")]
    assert len(set(sent)) == len(sent) == 4 * (resyncs + 1)
    assert not any(server.calls("/health_generate") for server in pair)


def test_nothing_is_sent_during_a_resync(
    pair: tuple[HoldingServer, HoldingServer], background: ThreadPoolExecutor
) -> None:
    def slow(fleet: SGLangFleet, tensors: NamedTensors, version: int) -> None:
        if version == 5:
            return
        fleet.engines[0].client.pause("abort")
        late.append(background.submit(fleet.generate, PROMPTS[4:5], SAMPLING))  # one that starts meanwhile waits too
        while any(engine.load for engine in fleet.engines):
            time.sleep(0.01)
        time.sleep(0.1)
        fleet.engines[0].client.update_weight_version(version)
        fleet.engines[0].client.continue_generation()

    late: list[Future[list[Sample]]] = []
    server = pair[0]
    fleet = fleet_of(server, sync=slow)
    running = background.submit(fleet.generate, PROMPTS[:4], SAMPLING)
    server.await_running(12)
    fleet.resync([], version=6)
    server.await_running(15)
    server.release()
    assert len(running.result(10.0)) == 12
    assert groups(late[0].result(10.0)) == [0, 0, 0]
    paths = [path for path, _ in server.seen]
    assert "/generate" not in paths[paths.index("/pause_generation") : paths.index("/continue_generation")]


def test_a_failed_resync_ends_what_waits_anywhere(
    pair: tuple[HoldingServer, HoldingServer], background: ThreadPoolExecutor
) -> None:
    """Two requests are frozen in paused servers, which could not abort them, and four wait for their turn."""
    failed: list[float] = []

    def failing(fleet: SGLangFleet, tensors: NamedTensors, version: int) -> None:
        if version > 5:
            for engine in fleet.engines:
                engine.client.pause("in_place")
            failed.append(time.monotonic())
            raise RLVRError("weights are gone")

    fleet = fleet_of(*pair, sync=failing, requests_per_engine=1)
    running = background.submit(fleet.generate, PROMPTS, SAMPLING, wanted=3)
    for server in pair:
        server.await_running(3)
    with pytest.raises(RLVRError, match="weights are gone"):
        fleet.resync([], version=6)
    with pytest.raises(RLVRError, match=r"broken off because the resync to version 6 failed \(weights are gone\); see"):
        running.result(10.0)
    assert time.monotonic() - failed[0] < 1.0
    assert_left(fleet)
    assert not any(server.calls("/abort_request") for server in pair)
    with pytest.raises(RLVRError, match="no complete set of weights"):
        fleet.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize("mute", [False, True], ids=["answering", "mute"])
def test_close_ends_a_generation_even_on_a_server_that_hangs(
    pair: tuple[HoldingServer, HoldingServer], background: ThreadPoolExecutor, mute: bool
) -> None:
    fleet = fleet_of(*pair)
    running = background.submit(fleet.generate, PROMPTS[:4], SAMPLING)
    for server in pair:
        server.await_running(6)
    if mute:
        pair[0].scripts["/abort_request"] = lambda body: (time.sleep(3.0), {})  # type: ignore[func-returns-value, return-value]
    start = time.monotonic()
    fleet.close()
    with pytest.raises(RLVRError, match="broken off because the SGLang fleet was closed"):
        running.result(0.1)
    assert time.monotonic() - start < (1.5 if mute else 0.8)
    assert_left(fleet)
    assert len(pair[1].aborted) == 6
    with pytest.raises(RLVRError, match="the SGLang fleet is closed"):
        fleet.generate(PROMPTS, SAMPLING)


TRAINER = """
import sys, threading
from pathlib import Path
from megatron_rlvr.core import RLVRError, SamplingParams
from megatron_rlvr.rollout import load_tokenizer
from megatron_rlvr.rollout.sglang.launch import FleetSettings, sglang_fleet
base, *urls = sys.argv[1:]
settings = FleetSettings(Path("logs"), urls=tuple(urls))
with sglang_fleet(base, load_tokenizer(base), lambda fleet, tensors, version: None, settings) as fleet:
    fleet.resync([], 5)
    arguments = (["4", "7"], SamplingParams(temperature=1.0, max_new_tokens=2, samples_per_prompt=3, seed=1))
    threading.Thread(target=fleet.generate, args=arguments).start()
    sys.stdin.readline()
    raise RLVRError("the trainer failed")
"""


def test_a_trainer_that_fails_exits_at_once(pair: tuple[HoldingServer, HoldingServer]) -> None:
    """Although a thread of it generates that the interpreter waits for."""
    command = [sys.executable, "-c", TRAINER, str(BASE), *(server.url for server in pair)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True) as trainer:
        for server in pair:
            with server.changed:
                assert server.changed.wait_for(lambda: len(server.running) == 3, 60.0)  # noqa: B023 - waits here
        start = time.monotonic()
        try:
            _, errors = trainer.communicate("fail\n", 20.0)
        finally:
            trainer.kill()
    assert time.monotonic() - start < 3.0
    assert trainer.returncode == 1
    assert "RLVRError: the trainer failed" in errors
    assert "broken off because the SGLang fleet was closed" in errors
    assert [len(server.aborted) for server in pair] == [3, 3]


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """How the samples of every reply of the real server ended; of every second prompt they go on for 48 tokens."""
    original, ends = fleet_module.generate_payload, []
    generate = SGLangClient.generate

    def stretched(group: int, *others: Any) -> dict[str, Any]:
        payload = original(group, *others)
        for entry in payload["sampling_params"]:
            entry |= {"max_new_tokens": 48 if group % 2 else 2, "ignore_eos": True}
        return payload

    def noted(*arguments: Any, **named: Any) -> list[dict[str, Any]]:
        samples = generate(*arguments, **named)
        ends.append([sample["meta_info"]["finish_reason"]["type"] for sample in samples])
        return samples

    monkeypatch.setattr(fleet_module, "generate_payload", stretched)
    monkeypatch.setattr(SGLangClient, "generate", noted)
    return ends


MANY = SamplingParams(temperature=1.0, max_new_tokens=48, samples_per_prompt=16, seed=7)


def test_stragglers_on_the_real_server(replies: list[list[str]]) -> None:
    _, client = shared_server()
    fleet = shared_fleet()
    fleet.resync(load_file(BASE / "model.safetensors").items(), version=61)
    samples = fleet.generate(PROMPTS, MANY, wanted=3)
    assert groups(samples) == [group for group in (0, 2, 4) for _ in range(16)]
    assert {len(sample.response_ids) for sample in samples} == {2}
    assert sorted(replies) == [["abort"] * 16] * 3 + [["length"] * 16] * 3
    assert_left(fleet)
    client.flush_cache(1.0)  # which it refuses while a request runs
    assert len(fleet.generate(PROMPTS, MANY)) == 96


def test_a_generation_outlives_resyncs_of_the_real_server(
    replies: list[list[str]], background: ThreadPoolExecutor
) -> None:
    _, client = shared_server()
    sync = Resync(BASE, TensorTransport())
    fleet = SGLangFleet(BASE, load_tokenizer(BASE), [FleetEngine(client)], sync)
    weights = load_file(BASE / "model.safetensors")
    fleet.resync(weights.items(), version=71)
    running = background.submit(fleet.generate, PROMPTS, MANY)
    for version in (72, 73):
        while not (fleet.engines[0].load or running.done()):
            time.sleep(0.001)
        fleet.resync(weights.items(), version)
    samples = running.result(60.0)
    assert groups(samples) == [group for group in range(6) for _ in range(16)]
    assert {sample.weight_version for sample in samples if sample.group % 2} == {73}
    assert ["abort"] * 16 in replies
    assert_left(fleet)
