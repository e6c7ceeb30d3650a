"""A real SGLang server for the whole test run, on the demo's base model; what is needed of it starts once."""

from __future__ import annotations

import atexit
import functools
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

from megatron_rlvr.core import RLVRError
from megatron_rlvr.rollout import NamedTensors, load_tokenizer
from megatron_rlvr.rollout.sglang.client import SGLangClient
from megatron_rlvr.rollout.sglang.engines import FleetEngine
from megatron_rlvr.rollout.sglang.flags import Flag, Installation, find_python, read_installation
from megatron_rlvr.rollout.sglang.fleet import SGLangFleet
from megatron_rlvr.rollout.sglang.server import START_TIMEOUT_S, Launched, sglang_server

BASE = Path(__file__).parents[2] / "examples" / "countdown" / "base"

# All that the tests of a real server do otherwise with CUDA is chosen here. The trainer's tensors are on the last GPU
# and a server's ranks on the first ones: with one GPU, on the same.
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.device_count() - 1) if CUDA else torch.device("cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
# Nats, to a forward pass in float32. In bf16 a server on CPUs is up to 0.13 off; other weights are off by 4 on average.
TOLERANCE = 0.3 if CUDA else 1e-5
START_S = 600.0 if CUDA else START_TIMEOUT_S  # kernels are compiled
FLAGS: dict[str, Flag] = {"max_total_tokens": 20000, "max_running_requests": 64}
if CUDA:  # heads of 16 are too small for other kernels
    FLAGS |= {"dtype": "bfloat16", "attention_backend": "triton", "sampling_backend": "pytorch"}
    FLAGS |= {"mem_fraction_static": 0.3}


@functools.cache
def installation() -> Installation:
    """SGLang's environment; skips the test where there is none."""
    try:
        python = find_python()
    except RLVRError as error:
        pytest.skip(f"no real SGLang server: {error}")
    return read_installation(python)


def release() -> tuple[int, ...]:
    """SGLang's version, to compare with others."""
    return tuple(int(part) for part in installation().version.split(".")[:3])


def version_spans(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """Which weights made which tokens of a reply; before 0.5.20 a server names the last of them alone."""
    meta = sample["meta_info"]
    if release() >= (0, 5, 20):
        spans: list[dict[str, Any]] = meta["weight_versions"]
        return spans
    assert "weight_versions" not in meta
    return [{"version": meta["weight_version"], "start": 0, "end": len(sample["output_ids"])}]


def backend(tensor_parallel: int = 1) -> Literal["gloo", "nccl"]:
    """What can broadcast from the trainer to so many ranks; NCCL wants a GPU for each of them all."""
    return "nccl" if torch.cuda.device_count() > tensor_parallel else "gloo"


@functools.cache
def scratch() -> Path:
    directory = tempfile.TemporaryDirectory(prefix="rlvr-test-")
    atexit.register(directory.cleanup)
    return Path(directory.name)


@functools.cache
def shared_server(tensor_parallel: int = 1) -> tuple[Launched, SGLangClient]:
    """The server that all tests of this run share, ready; it ends with the run."""
    if CUDA and torch.cuda.device_count() < tensor_parallel:
        pytest.skip(
            f"a server of {tensor_parallel} ranks needs as many GPUs, and there are {torch.cuda.device_count()}"
        )
    flags = FLAGS | {"tp_size": tensor_parallel}
    server = sglang_server(installation(), BASE, flags, scratch() / f"tp{tensor_parallel}.log")
    atexit.register(server.close)
    client = SGLangClient(server.url, timeout_s=30.0, generate_timeout_s=120.0)
    server.start()
    server.wait_ready(client, time.monotonic() + START_S)
    return server, client


def disk_sync(fleet: SGLangFleet, tensors: NamedTensors, version: int) -> None:
    """The simplest way to new weights, for tests of everything else: save them, and have every server load them."""
    directory = Path(tempfile.mkdtemp(dir=scratch()))
    save_file({name: tensor.contiguous() for name, tensor in tensors}, directory / "model.safetensors")
    (directory / "config.json").write_text((BASE / "config.json").read_text())
    for engine in fleet.serving():
        engine.client.flush_cache(10.0)
        engine.client.update_weights_from_disk(str(directory), version)


def shared_fleet() -> SGLangFleet:
    """A fleet of the shared server alone, before its first resync."""
    server, client = shared_server()
    return SGLangFleet(BASE, load_tokenizer(BASE), [FleetEngine(client, server)], disk_sync)
