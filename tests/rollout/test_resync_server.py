"""Resync of a real SGLang server: what it serves afterwards, to the last bit and to 1e-5 in its log-probs."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from sglang_server import BASE, scratch, shared_server
from transformers import AutoModelForCausalLM

from megatron_rlvr.core import SamplingParams
from megatron_rlvr.rollout import load_tokenizer
from megatron_rlvr.rollout.resync import BroadcastTransport, DiskTransport, Resync, TensorTransport, Transport
from megatron_rlvr.rollout.resync.manifest import Manifest, ModelShape, Served
from megatron_rlvr.rollout.sglang.client import SGLangClient
from megatron_rlvr.rollout.sglang.fleet import FleetEngine, SGLangFleet

TOLERANCE = 1e-5
BUCKET_BYTES = 60_000
PROMPT = [5, 6, 7, 4, 9]
TRANSPORTS = ["disk", "tensor", "broadcast"]


def transport(name: str) -> Transport:
    if name == "disk":
        return DiskTransport(scratch() / "weights")
    return TensorTransport() if name == "tensor" else BroadcastTransport(timeout_s=30.0)


@functools.cache
def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = load_file(BASE / "model.safetensors")
    return {name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}


@torch.no_grad()
def logprobs(seed: int, ids: list[int]) -> torch.Tensor:
    """What transformers computes for all of ``ids`` but the first, with the weights of ``seed``."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model.load_state_dict(weights(seed), strict=False)
    logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    found: torch.Tensor = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return found


@contextmanager
def fleet_over(
    client: SGLangClient, way: Transport, pause: Literal["abort", "retract"] = "abort"
) -> Iterator[SGLangFleet]:
    sync = Resync(BASE, way, bucket_bytes=BUCKET_BYTES, pause=pause)
    yield SGLangFleet(BASE, load_tokenizer(BASE), [FleetEngine(client)], sync)
    sync.close()


def generate(client: SGLangClient, tokens: int, count: int = 1) -> list[dict[str, Any]]:
    sampling = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
    return client.generate({"input_ids": [PROMPT] * count, "sampling_params": sampling, "return_logprob": True})


def check_served(client: SGLangClient, seed: int, version: int) -> None:
    """The server's checksums and log-probs are those of ``weights(seed)``, and not those of the base."""
    shape = ModelShape.read(BASE)
    served = Served.ask(client, shape)
    right, wrong = Manifest(shape, served), Manifest(shape, served)
    for name, tensor in weights(seed).items():
        right.add(name, tensor)
    for name, tensor in load_file(BASE / "model.safetensors").items():
        wrong.add(name, tensor)
    assert right.differences(client.checksums()) == ""
    assert wrong.differences(client.checksums()).startswith("rank 0 holds other weights")
    (sample,) = generate(client, 12)
    found = torch.tensor([logprob for logprob, _, _ in sample["meta_info"]["output_token_logprobs"]])
    expected = logprobs(seed, PROMPT + sample["output_ids"])[len(PROMPT) - 1 :]
    assert (found - expected).abs().max() < TOLERANCE
    assert sample["meta_info"]["weight_versions"] == [{"version": str(version), "start": 0, "end": 12}]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_new_weights_are_served(name: str, tensor_parallel: int) -> None:
    _, client = shared_server() if tensor_parallel == 1 else shared_server(tensor_parallel)  # it caches by arguments
    with fleet_over(client, transport(name)) as fleet:
        for version, seed in ((11, 1), (12, 2), (12, 2)):
            fleet.resync(weights(seed).items(), version)
            check_served(client, seed, version)


def test_requests_go_on_across_a_resync_with_exact_spans() -> None:
    _, client = shared_server()
    with fleet_over(client, TensorTransport(), "retract") as fleet, ThreadPoolExecutor(1) as pool:
        fleet.resync(weights(1).items(), version=21)
        for attempt in range(5):  # the resync must fall into the half second that generation takes
            running = pool.submit(generate, client, 55, 8)
            time.sleep(0.1 + 0.1 * attempt)
            fleet.resync(weights(2).items(), version=22)
            replies = running.result()
            if all(len(reply["meta_info"]["weight_versions"]) == 2 for reply in replies):
                break
            fleet.resync(weights(1).items(), version=21)
    for reply in replies:
        old, new = reply["meta_info"]["weight_versions"]
        cut = old["end"]
        assert (old["version"], old["start"], new["version"]) == ("21", 0, "22")
        assert 0 < cut == new["start"] < new["end"] == len(reply["output_ids"]) == 55
        found = torch.tensor([logprob for logprob, _, _ in reply["meta_info"]["output_token_logprobs"]])
        ids, start = PROMPT + reply["output_ids"], len(PROMPT) - 1
        assert (found[:cut] - logprobs(1, ids)[start : start + cut]).abs().max() < TOLERANCE
        assert (found[cut:] - logprobs(2, ids)[start + cut :]).abs().max() < TOLERANCE


def test_requests_that_a_resync_aborted_are_asked_again() -> None:
    _, client = shared_server()
    sampling = SamplingParams(temperature=1.0, max_new_tokens=40, samples_per_prompt=16, seed=3)
    with fleet_over(client, TensorTransport(), "abort") as fleet, ThreadPoolExecutor(1) as pool:
        fleet.resync(weights(1).items(), version=31)
        running = pool.submit(fleet.generate, ["259:07;", "48:"], sampling)
        time.sleep(0.1)
        fleet.resync(weights(2).items(), version=32)
        samples = running.result()
    assert len(samples) == 32
    assert all(len(sample.version_spans) == 1 for sample in samples)


def test_a_sender_that_dies_does_not_hang_the_server() -> None:
    """It joined, announced a bucket and never broadcast it; the server must be free again without any timeout."""
    _, client = shared_server()
    script = f"""
import os, threading, time, torch
from megatron_rlvr.rollout.resync import BroadcastTransport
from megatron_rlvr.rollout.sglang.client import SGLangClient
client = SGLangClient({client.url!r})
link = BroadcastTransport(timeout_s=30.0).link(client)
link.open()
announce = (["model.norm.weight"], [torch.float32], [[64]], link._name, "flattened_bucket")
threading.Thread(target=client.update_weights_from_distributed, args=announce, daemon=True).start()
time.sleep(1.0)
os._exit(1)
"""
    subprocess.run([sys.executable, "-c", script], timeout=120, check=False, capture_output=True)
    with fleet_over(client, BroadcastTransport(timeout_s=30.0)) as fleet:
        fleet.resync(weights(2).items(), version=42)
        check_served(client, 2, 42)


def test_memory_that_was_released_and_resumed_takes_new_weights() -> None:
    _, client = shared_server()
    with pytest.raises(ValueError, match="was not released"):
        client.resume_memory_occupation()
    client.release_memory_occupation()
    client.resume_memory_occupation()
    with fleet_over(client, TensorTransport()) as fleet:
        fleet.resync(weights(1).items(), version=51)
        check_served(client, 1, 51)
