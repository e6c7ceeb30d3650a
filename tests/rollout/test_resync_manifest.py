"""Checksums, what each rank must hold, and buckets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faulty_server import RANKS, FaultyServer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_rlvr.core import RLVRError
from megatron_rlvr.rollout.resync.buckets import fill_buckets
from megatron_rlvr.rollout.resync.checksums import cpu_checksum, cuda_checksum
from megatron_rlvr.rollout.resync.manifest import Manifest, ModelShape, Served

BASE = Path(__file__).parents[2] / "examples" / "countdown" / "base"
LOW = 2**32 - 1


def test_cpu_checksum_is_the_head_of_sha256() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    expected = hashlib.sha256(bytes.fromhex("0000803f004040408040a040")).hexdigest()
    assert cpu_checksum(tensor) == expected[:16]
    assert cpu_checksum(tensor.T) != cpu_checksum(tensor)
    assert cpu_checksum(tensor.T) == cpu_checksum(tensor.T.contiguous())


def word_by_word(data: bytes) -> str:
    """SGLang's CUDA kernels in Python integers, a word at a time."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x85EBCA6B & LOW
        x ^= x >> 13
        x = x * 0xC2B2AE35 & LOW
        return x ^ x >> 16

    def turn(x: int, by: int) -> int:
        return (x << by | x >> (32 - by)) & LOW

    seeds = 0x243F6A88, (0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & LOW
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
    total = 0
    for base in range(0, len(words), 8192):
        h1 = h2 = 0
        for at, word in enumerate(words[base : base + 8192], base):
            h1 = h1 + mix(word ^ ((at * 0x27D4EB2D + seeds[0]) & LOW ^ turn(at, 15))) & LOW
            h2 = h2 + mix(word ^ ((at * 0x165667B1 + seeds[1]) & LOW ^ turn(at, 13))) & LOW
        total = total + (mix(h1 ^ len(data) & LOW) << 32 | mix(h2 ^ len(data) & LOW)) & 2**64 - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        total = (total ^ total >> shift) * factor & 2**64 - 1
    return f"{total ^ total >> 31:016x}"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 20_000), st.integers(0, 2**31))
def test_cuda_checksum_equals_the_kernels(size: int, seed: int) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert cuda_checksum(data) == (word_by_word(data.numpy().tobytes()) if size else "0" * 16)


def test_cuda_checksum_across_many_tiles() -> None:
    data = torch.arange(2**20 + 12_345, dtype=torch.int32)
    whole = word_by_word(data.numpy().tobytes())
    assert cuda_checksum(data) == whole
    data[-1] ^= 1
    assert cuda_checksum(data) != whole


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(ModelShape.read(BASE), Served(RANKS, torch.float32, cuda=False))


def test_manifest_of_two_ranks_agrees_with_a_loader_of_its_own(manifest: Manifest) -> None:
    weights = load_file(BASE / "model.safetensors")
    for name, tensor in weights.items():
        manifest.add(name, tensor)
    server = FaultyServer(weights)
    _, reply = server.answer("/weights_checker", {"action": "checksum"})
    ranks = [rank["checksums"] for rank in reply["ranks"]]
    assert manifest.differences(ranks) == ""
    assert manifest.differences(ranks[:1]) == "1 ranks reported checksums, expected 2"
    assert manifest.differences(ranks[::-1]).startswith("rank 0 holds other weights")
    name = next(iter(ranks[1]))
    assert name in manifest.differences([ranks[0], {key: ranks[1][key] for key in ranks[1] if key != name}])
    assert "stranger" in manifest.differences([ranks[0] | {"stranger": "0"}, ranks[1]])


def test_key_value_heads_are_copied_to_more_ranks_than_there_are_on_gpus() -> None:
    """Four ranks, two heads: ranks 0 and 1 hold the first."""
    manifest = Manifest(ModelShape(2, True, "bfloat16"), Served(4, torch.bfloat16, cuda=True))
    parts = {part: torch.randn(rows, 3).bfloat16() for part, rows in (("q", 8), ("k", 4), ("v", 4))}
    for part, tensor in parts.items():
        manifest.add(f"model.layers.0.self_attn.{part}_proj.weight", tensor)
    heads = [torch.cat([parts["q"][2 * r : 2 * r + 2], *(parts[p][r // 2 * 2 :][:2] for p in "kv")]) for r in range(4)]
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert manifest.differences([{name: cuda_checksum(head)} for head in heads]) == ""


def test_weights_that_ranks_do_not_divide_are_refused_in_words() -> None:
    manifest = Manifest(ModelShape(2, True, "float32"), Served(3, torch.float32, cuda=True))
    with pytest.raises(RLVRError, match="tp_size=3 does not divide a dimension of 64"):
        manifest.add("model.layers.0.self_attn.o_proj.weight", torch.zeros(8, 64))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 200))
def test_buckets_hold_every_tensor_once_within_their_bounds(sizes: list[int], limit: int) -> None:
    tensors = {f"t{i}": torch.randn(size, 2).T for i, size in enumerate(sizes)}
    buckets = list(fill_buckets(tensors.items(), limit))
    assert [bucket.number for bucket in buckets] == list(range(len(buckets)))
    assert all(len(bucket.flat) <= limit or len(bucket.names) == 1 for bucket in buckets)
    found = [item for bucket in buckets for item in bucket.tensors().items()]
    assert [name for name, _ in found] == list(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found)


def test_buckets_are_filled_only_when_asked_for() -> None:
    asked: list[int] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(6):
            asked.append(number)
            yield f"t{number}", torch.zeros(10)

    stream = fill_buckets(tensors(), 80)
    next(stream)
    assert asked == [0, 1, 2]
