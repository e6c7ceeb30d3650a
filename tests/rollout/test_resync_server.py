"""Resync of a real SGLang server: what it serves afterwards, to the last bit and in its log-probs.

``python -m pytest tests/rollout`` with ``SGLANG_PYTHON`` runs it on another version and, where there is a GPU, on CUDA.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from scripted_sglang import ScriptedServer, serve
from sglang_server import BASE, DEVICE, DTYPE, TOLERANCE, backend, scratch, shared_server, version_spans
from torch.multiprocessing import reductions
from transformers import AutoModelForCausalLM

from megatron_rlvr.core import RLVRError, SamplingParams
from megatron_rlvr.rollout import load_tokenizer
from megatron_rlvr.rollout.resync import BroadcastTransport, DiskTransport, Resync, TensorTransport, Transport
from megatron_rlvr.rollout.resync import broadcast as broadcast_module
from megatron_rlvr.rollout.resync.buckets import Bucket
from megatron_rlvr.rollout.resync.manifest import Manifest, ModelShape, Served
from megatron_rlvr.rollout.sglang.client import SGLangClient
from megatron_rlvr.rollout.sglang.engines import FleetEngine
from megatron_rlvr.rollout.sglang.fleet import SGLangFleet

BUCKET_BYTES = 60_000
PROMPT = [5, 6, 7, 4, 9]
TRANSPORTS = ["disk", "tensor", "broadcast"]


def transport(name: str, tensor_parallel: int) -> Transport:
    if name == "disk":
        return DiskTransport(scratch() / "weights")
    return (
        TensorTransport() if name == "tensor" else BroadcastTransport(timeout_s=30.0, backend=backend(tensor_parallel))
    )


@functools.cache
def weights(seed: int) -> dict[str, torch.Tensor]:
    """The trainer's: a server's dtype, on the trainer's device."""
    generator = torch.Generator().manual_seed(seed)
    base = load_file(BASE / "model.safetensors")
    return {
        name: (tensor + 0.02 * torch.randn(tensor.shape, generator=generator)).to(DEVICE, DTYPE)
        for name, tensor in base.items()
    }


@torch.no_grad()
def logprobs(seed: int, ids: list[int]) -> torch.Tensor:
    """What transformers computes in float32 for all of ``ids`` but the first, with the weights of ``seed``."""
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
        wrong.add(name, tensor.to(DTYPE))
    assert right.differences(client.checksums()) == ""
    assert wrong.differences(client.checksums()).startswith("rank 0 holds other weights")
    (sample,) = generate(client, 12)
    found = torch.tensor([logprob for logprob, _, _ in sample["meta_info"]["output_token_logprobs"]])
    expected = logprobs(seed, PROMPT + sample["output_ids"])[len(PROMPT) - 1 :]
    assert (found - expected).abs().max() < TOLERANCE
    assert version_spans(sample) == [{"version": str(version), "start": 0, "end": 12}]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_new_weights_are_served(name: str, tensor_parallel: int) -> None:
    _, client = shared_server() if tensor_parallel == 1 else shared_server(tensor_parallel)  # it caches by arguments
    with fleet_over(client, transport(name, tensor_parallel)) as fleet:
        for version, seed in ((11, 1), (12, 2), (12, 2)):
            fleet.resync(weights(seed).items(), version)
            check_served(client, seed, version)


def test_requests_go_on_across_a_resync_with_exact_spans() -> None:
    _, client = shared_server()
    if not client.sessions:
        pytest.skip("before SGLang 0.5.21 a server does not flush its cache while retracted requests wait")
    with fleet_over(client, TensorTransport(), "retract") as fleet, ThreadPoolExecutor(1) as pool:
        fleet.resync(weights(1).items(), version=21)
        for attempt in range(6):  # the resync must fall into the fraction of a second that generation takes
            running = pool.submit(generate, client, 55, 8)
            time.sleep(0.02 * 2**attempt)
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
link = BroadcastTransport(timeout_s=30.0, backend={backend()!r}).link(client)
link.open()
announce = (["model.norm.weight"], [torch.float32], [[64]], link._name, "flattened_bucket")
threading.Thread(target=client.update_weights_from_distributed, args=announce, daemon=True).start()
time.sleep(1.0)
os._exit(1)
"""
    subprocess.run([sys.executable, "-c", script], timeout=120, check=False, capture_output=True)
    with fleet_over(client, transport("broadcast", 1)) as fleet:
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


# What only GPUs do, as far as it shows without one: torch's side is replaced, ours is not.


def test_a_cuda_handle_names_its_gpu_and_is_for_one_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)[6] == "storage_device"
    counters = itertools.count()

    def rebuild(*arguments: Any) -> tuple[Any, ...]:
        return arguments

    def reduce(tensor: torch.Tensor) -> tuple[Any, ...]:
        where = (torch.Tensor, tensor.shape, tensor.stride(), 0, torch.storage.TypedStorage, tensor.dtype, 3)
        return rebuild, (*where, b"memory", 8, 0, False, b"counters", next(counters), b"event", True)

    rebuild.__module__, rebuild.__qualname__ = reductions.__name__, "rebuild_cuda_tensor"
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild)
    monkeypatch.setattr(reductions, "reduce_tensor", reduce)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1b4e28ba"))
    bucket: Any = SimpleNamespace(flat=SimpleNamespace(is_cuda=True), tensors=lambda: {"w": torch.ones(2)})
    opened = [pickle.loads(payload) for payload in TensorTransport().pack(bucket, 2)]
    assert [name for ((name, _),) in opened] == ["w", "w"]
    assert [(arguments[6], arguments[7], arguments[12]) for ((_, arguments),) in opened] == [
        ("1b4e28ba", b"memory", 0),
        ("1b4e28ba", b"memory", 1),
    ]


def test_a_refusal_ends_a_broadcast_that_never_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits for its peers without end; the reply names the one cause that a user can mend."""
    group, left = object(), list[object]()
    forever = threading.Event()
    server = ScriptedServer()
    why = "Failed to receive weights: NCCL error. Last error: Duplicate GPU detected : rank 1 and rank 0 both on 1000"
    server.scripts["/update_weights_from_distributed"] = lambda body: (400, {"success": False, "message": why})
    monkeypatch.setattr(broadcast_module, "_process_group", lambda *arguments: group)
    monkeypatch.setattr(broadcast_module.dist, "broadcast", lambda *arguments, **options: forever.wait())
    monkeypatch.setattr(broadcast_module.c10d, "_abort_process_group", left.append)
    bucket = Bucket("stream", 0, ["w"], [torch.Size([2])], torch.float32, torch.zeros(8, dtype=torch.uint8))
    with serve(server):
        link = BroadcastTransport(backend="nccl").link(SGLangClient(server.url, timeout_s=5.0))
        link.open()
        with pytest.raises(RLVRError, match=r"two ranks on one GPU, .* use rollout\.transport=tensor"):
            link.send(bucket)
        link.close(tell=True)
        assert left == [group]
        assert len(server.calls("/destroy_weights_update_group")) == 1
    forever.set()
