"""Every fault at every stage of a resync: who goes on serving, why not, and that no wrong sample comes out.

``python tests/rollout/test_resync_faults.py`` prints the table of the README.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from faulty_server import FAULTS, PLACES, FaultyServer
from safetensors.torch import load_file
from scripted_sglang import serve

from megatron_rlvr.core import RLVRError, SamplingParams
from megatron_rlvr.rollout import load_tokenizer
from megatron_rlvr.rollout.resync import DiskTransport, Resync, TensorTransport, Transport
from megatron_rlvr.rollout.sglang.client import SGLangClient
from megatron_rlvr.rollout.sglang.engines import EngineState, FleetEngine
from megatron_rlvr.rollout.sglang.fleet import SGLangFleet
from megatron_rlvr.rollout.sglang.server import Launched

BASE = Path(__file__).parents[2] / "examples" / "countdown" / "base"
DEADLINE_S = 1.5
BUCKET_BYTES = 60_000
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=2, samples_per_prompt=2, seed=1)
PROMPTS = ["259:16;"] * 12
# Replies that say nothing, and leave nothing wrong: weights and version are proved afterwards all the same.
HARMLESS = {("pause", "ignored"), ("flush", "ignored"), ("close session", "ignored")}


def cells(place: str) -> list[str]:
    return [fault for fault in FAULTS if place == "transfer" or fault not in ("corrupt", "stale rank")]


@functools.cache
def base() -> dict[str, torch.Tensor]:
    return load_file(BASE / "model.safetensors")


def weights(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in base().items()}


def fingerprint(version: int) -> float:
    return FaultyServer(weights(version)).fingerprint()


def fleet_of(*servers: FaultyServer, transport: Transport | None = None, minimum: int = 1) -> SGLangFleet:
    clients = [SGLangClient(server.url, timeout_s=DEADLINE_S, generate_timeout_s=2 * DEADLINE_S) for server in servers]
    sync = Resync(BASE, transport or TensorTransport(), bucket_bytes=BUCKET_BYTES, patience_s=DEADLINE_S)
    return SGLangFleet(BASE, load_tokenizer(BASE), [FleetEngine(client) for client in clients], sync, minimum=minimum)


@dataclass
class Outcome:
    """What became of one faulty server.

    Attributes:
        state: After the resync that it failed in.
        why: The reason then.
        right: Whether a serving one held the new weights.
        healed: Its state after another resync without the fault.
    """

    state: EngineState
    why: str
    right: bool
    healed: EngineState


Found = tuple[dict[str, Outcome], list[float], bool]


@functools.cache
def running() -> dict[str, Future[Found]]:
    """All places side by side: what they do is mostly waiting."""
    pool = ThreadPoolExecutor(4)
    return {place: pool.submit(strike, place) for place in PLACES}


def outcomes(place: str) -> Found:
    return running()[place].result()


def strike(place: str) -> Found:
    """One fleet of a healthy server and one per fault; also the log-probs of its samples, and if the healthy served."""
    with ExitStack() as stack:
        servers = [FaultyServer(base()) for _ in range(1 + len(cells(place)))]
        for server in servers:
            stack.enter_context(serve(server))
        fleet = fleet_of(*servers)
        fleet.resync(weights(1).items(), version=1)
        for server, fault in zip(servers[1:], cells(place), strict=True):
            server.place, server.fault = PLACES[place], fault
        fleet.resync(weights(2).items(), version=2)
        states = [(engine.state, engine.why) for engine in fleet.engines]
        right = [server.fingerprint() == fingerprint(2) for server in servers]
        samples = fleet.generate(PROMPTS, SAMPLING)
        for server in servers:
            server.place = ""
        fleet.resync(weights(3).items(), version=3)
        healed = [engine.state for engine in fleet.engines]
        for server, state in zip(servers, healed, strict=True):
            assert state is EngineState.OUT or server.fingerprint() == fingerprint(3)
    rows = zip(states, right, healed, strict=True)
    found = [Outcome(state, why, held, later) for (state, why), held, later in rows]
    logprobs = [logprob for sample in samples for logprob in sample.logprobs]
    return dict(zip(cells(place), found[1:], strict=True)), logprobs, found[0].state is EngineState.SERVING


@pytest.mark.parametrize(("place", "fault"), [(place, fault) for place in PLACES for fault in cells(place)])
def test_a_fault_takes_its_server_out_and_no_other(place: str, fault: str) -> None:
    found, logprobs, healthy_serves = outcomes(place)
    outcome = found[fault]
    assert healthy_serves
    if (place, fault) in HARMLESS:
        assert outcome.state is EngineState.SERVING
    else:
        assert outcome.state is EngineState.OUT
        assert outcome.why
    assert outcome.state is EngineState.OUT or outcome.right
    assert set(logprobs) == {fingerprint(2)}
    assert len(logprobs) == 2 * 2 * len(PROMPTS)
    assert outcome.healed is (EngineState.OUT if fault == "death" else EngineState.SERVING)


def test_the_reason_names_stage_rank_and_tensor() -> None:
    found, _, _ = outcomes("transfer")
    assert found["stale rank"].why.startswith("verify of version 2 failed")
    assert "rank 1 holds other weights than were sent in model." in found["stale rank"].why
    assert "rank 0 holds other weights" in found["corrupt"].why
    assert " more" not in found["corrupt"].why
    assert "rank 0 holds other weights" in found["ignored"].why
    assert found["error"].why.startswith("transfer of version 2 failed")
    assert "nothing came within" in found["hang"].why


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    server = FaultyServer(base())
    with serve(server):
        yield server


def test_too_few_servers_left_is_said_in_words(server: FaultyServer) -> None:
    other = FaultyServer(base())
    with serve(other):
        fleet = fleet_of(server, other, minimum=2)
        other.place, other.fault = PLACES["transfer"], "corrupt"
        with pytest.raises(
            RLVRError, match=r"1 of 2 SGLang engines serve, fewer than the 2 needed .*verify of version 7"
        ):
            fleet.resync(weights(7).items(), version=7)
        with pytest.raises(RLVRError, match="no complete set of weights"):
            fleet.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("begin", "first token")])
def test_a_resync_that_broke_off_anywhere_is_repeated(server: FaultyServer, place: str) -> None:
    """The trainer dies behind ``place``: its successor finds the server as it was left, and may repeat a version."""
    fleet = fleet_of(server)
    server.place, server.fault = PLACES[place], "error"
    with pytest.raises(RLVRError, match="0 of 1 SGLang engines serve"):
        fleet.resync(weights(1).items(), version=1)
    server.place = ""
    successor = fleet_of(server)
    for _ in range(2):
        successor.resync(weights(1).items(), version=1)
        assert server.fingerprint() == fingerprint(1)
        assert {sample.weight_version for sample in successor.generate(PROMPTS, SAMPLING)} == {1}


def test_no_sample_of_a_server_taken_out_meanwhile_is_returned(server: FaultyServer) -> None:
    other = FaultyServer(base())
    with serve(other), ThreadPoolExecutor(1) as pool:
        fleet = fleet_of(server, other)
        fleet.resync(weights(1).items(), version=1)
        server.place, server.fault = PLACES["first token"], "late"
        server.replace_weights(base())  # so that its samples would show
        running = pool.submit(fleet.generate, PROMPTS, SAMPLING)
        while not fleet.engines[0].load:
            time.sleep(0.01)
        fleet.deregister(fleet.engines[0], "taken out by a test")
        logprobs = {logprob for sample in running.result() for logprob in sample.logprobs}
    assert logprobs == {other.fingerprint()}


class Restartable:
    """Stands for the process of a server that we launched; a start brings it back with the weights of the base."""

    alive = True

    def __init__(self, server: FaultyServer) -> None:
        self.server = server
        self.starts = 0

    def start(self) -> None:
        self.starts += 1

    def come_up(self) -> None:
        self.server.__init__(base())  # type: ignore[misc]


def test_a_dead_server_of_ours_is_restarted_once_and_readmitted_after_a_full_resync(server: FaultyServer) -> None:
    process = Restartable(server)
    url, other = server.url, FaultyServer(base())
    with serve(other):
        fleet = fleet_of(server, other)
        fleet.engines[0].process = cast(Launched, process)
        server.place, server.fault = PLACES["transfer"], "death"
        for version in (1, 2):  # in the second it is still starting
            fleet.resync(weights(version).items(), version)
            assert [engine.state for engine in fleet.engines] == [EngineState.OUT, EngineState.SERVING]
            assert process.starts == 1
        process.come_up()
        server.url = url
        fleet.resync(weights(3).items(), version=3)
        assert fleet.engines[0].state is EngineState.SERVING
        assert server.fingerprint() == fingerprint(3)
        assert process.starts == 1


def test_tensors_are_read_to_the_end_without_any_server(server: FaultyServer) -> None:
    """Reading them is collective: a rank that stopped early would leave the others waiting."""
    fleet = fleet_of(server)
    server.dead = True
    read: list[str] = []

    def noted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights(1).items():
            read.append(name)
            yield name, tensor

    with pytest.raises(RLVRError, match="0 of 1 SGLang engines serve"):
        fleet.resync(noted(), version=1)
    assert len(read) == len(base())


class SlowServer(FaultyServer):
    """Takes half a second over its first bucket, and notes how much of the stream was read by then, bytes."""

    def __init__(self) -> None:
        super().__init__(base())
        self.read = 0
        self.read_meanwhile: list[int] = []

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == PLACES["transfer"] and not self.read_meanwhile:
            time.sleep(0.5)
            self.read_meanwhile.append(self.read)
        return super().answer(path, body)


def test_the_gather_runs_ahead_of_the_wire_by_two_buckets_and_no_more() -> None:
    server = SlowServer()

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights(1).items():
            server.read += tensor.nbytes
            yield name, tensor

    with serve(server):
        fleet_of(server).resync(counted(), version=1)
    largest = max(tensor.nbytes for tensor in base().values())
    (read,) = server.read_meanwhile
    assert 2 * BUCKET_BYTES - largest < read <= 3 * BUCKET_BYTES + largest < server.read


def test_a_gather_that_fails_leaves_the_server_out_and_is_raised(server: FaultyServer) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(weights(1).items())[:20]
        raise RLVRError("a trainer rank is gone")

    fleet = fleet_of(server)
    with pytest.raises(RLVRError, match="a trainer rank is gone"):
        fleet.resync(broken(), version=1)
    assert "the trainer stopped sending" in fleet.engines[0].why
    assert server.version == "-1"


def test_an_incomplete_model_is_not_served(server: FaultyServer) -> None:
    fleet = fleet_of(server)
    with pytest.raises(RLVRError, match=r"gate_up_proj\.weight only \['gate_proj'\] were sent"):
        fleet.resync([item for item in weights(1).items() if "layers.1.mlp.up_proj" not in item[0]], version=1)


def test_disk_brings_the_same_weights(server: FaultyServer, tmp_path: Path) -> None:
    fleet = fleet_of(server, transport=DiskTransport(tmp_path / "weights"))
    for version in (1, 2):
        fleet.resync(weights(version).items(), version)
        assert server.fingerprint() == fingerprint(version)


def table() -> str:
    """Stage × fault, as Markdown."""
    lines = ["| stage | " + " | ".join(FAULTS) + " |", "|---" * (1 + len(FAULTS)) + "|"]
    for place in PLACES:
        found, _, _ = outcomes(place)
        row = [str(found[fault].state) if fault in found else "" for fault in FAULTS]
        lines.append(f"| {place} | " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
