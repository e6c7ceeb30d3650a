"""A real SGLang server for the whole test run, on the demo's base model; what is needed of it starts once."""

from __future__ import annotations

import atexit
import functools
import tempfile
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megatron_rlvr.core import RLVRError
from megatron_rlvr.rollout import NamedTensors, load_tokenizer
from megatron_rlvr.rollout.sglang.client import SGLangClient
from megatron_rlvr.rollout.sglang.flags import Installation, find_python, read_installation
from megatron_rlvr.rollout.sglang.fleet import FleetEngine, SGLangFleet
from megatron_rlvr.rollout.sglang.server import START_TIMEOUT_S, Launched, sglang_server

BASE = Path(__file__).parents[2] / "examples" / "countdown" / "base"


@functools.cache
def installation() -> Installation:
    """SGLang's environment; skips the test where there is none."""
    try:
        python = find_python()
    except RLVRError as error:
        pytest.skip(f"no real SGLang server: {error}")
    return read_installation(python)


@functools.cache
def scratch() -> Path:
    directory = tempfile.TemporaryDirectory(prefix="rlvr-test-")
    atexit.register(directory.cleanup)
    return Path(directory.name)


@functools.cache
def shared_server(tensor_parallel: int = 1) -> tuple[Launched, SGLangClient]:
    """The server that all tests of this run share, ready; it ends with the run."""
    flags = {"tp_size": tensor_parallel, "max_total_tokens": 20000, "max_running_requests": 64}
    server = sglang_server(installation(), BASE, flags, scratch() / f"tp{tensor_parallel}.log")
    atexit.register(server.close)
    client = SGLangClient(server.url, timeout_s=30.0, generate_timeout_s=120.0)
    server.start()
    server.wait_ready(client, time.monotonic() + START_TIMEOUT_S)
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
