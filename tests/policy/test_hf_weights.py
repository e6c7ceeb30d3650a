"""Hugging Face tensors into Megatron's shards and back, and the sentences for directories that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_rlvr.core import RLVRError
from megatron_rlvr.policy.hf_weights import (
    QKV,
    GateUp,
    Layout,
    Replicated,
    Sharded,
    TensorReader,
    VocabRows,
    WeightMap,
    padded_vocab,
    read_hf_config,
)

GOOD = {
    "model_type": "qwen3",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
small = st.integers(1, 4)


def numbered(*shape: int, start: int = 0) -> torch.Tensor:
    """A tensor whose elements are all different."""
    return torch.arange(start, start + int(torch.tensor(shape).prod())).reshape(shape)


def check_round_trip(layout: Layout, tensors: Sequence[torch.Tensor], parts: int) -> list[torch.Tensor]:
    shards = layout.split(tensors, parts)
    assert len(shards) == parts
    assert len({shard.shape for shard in shards}) == 1
    merged = layout.merge(shards)
    assert len(merged) == len(tensors)
    assert all(torch.equal(got, wanted) for got, wanted in zip(merged, tensors, strict=True))
    return shards


@given(parts=small, rows=small, columns=small, dim=st.sampled_from([0, 1]))
@settings(deadline=None)
def test_sharded(parts: int, rows: int, columns: int, dim: int) -> None:
    shape = (rows * parts, columns) if dim == 0 else (rows, columns * parts)
    shards = check_round_trip(Sharded(dim), [numbered(*shape)], parts)
    assert shards[0].shape == (rows, columns)


@given(parts=small, width=small)
@settings(deadline=None)
def test_replicated(parts: int, width: int) -> None:
    check_round_trip(Replicated(), [numbered(width)], parts)


@given(parts=small, vocab=st.integers(1, 40), width=small)
@settings(deadline=None)
def test_vocab_rows(parts: int, vocab: int, width: int) -> None:
    shards = check_round_trip(VocabRows(vocab), [numbered(vocab, width, start=1)], parts)
    whole = torch.cat(shards)
    assert len(whole) == padded_vocab(vocab, parts)
    assert len(whole) - vocab < parts
    assert not whole[vocab:].any()


@given(parts=small, rows=small, columns=small)
@settings(deadline=None)
def test_gate_up(parts: int, rows: int, columns: int) -> None:
    gate, up = numbered(rows * parts, columns), numbered(rows * parts, columns, start=1000)
    shards = check_round_trip(GateUp(), [gate, up], parts)
    for rank, shard in enumerate(shards):
        own = slice(rank * rows, (rank + 1) * rows)
        assert torch.equal(shard, torch.cat([gate[own], up[own]]))


@given(parts=small, groups=small, ratio=small, head=small, columns=small)
@settings(deadline=None)
def test_qkv(parts: int, groups: int, ratio: int, head: int, columns: int) -> None:
    kv_heads, query_heads = groups * parts, groups * parts * ratio
    query = numbered(query_heads * head, columns)
    key = numbered(kv_heads * head, columns, start=10_000)
    value = numbered(kv_heads * head, columns, start=20_000)
    shards = check_round_trip(QKV(query_heads, kv_heads, head), [query, key, value], parts)
    for group, block in enumerate(torch.cat(shards).chunk(kv_heads)):
        own, queries = slice(group * head, (group + 1) * head), slice(group * ratio * head, (group + 1) * ratio * head)
        assert torch.equal(block, torch.cat([query[queries], key[own], value[own]]))


def test_a_parameter_without_counterpart() -> None:
    with pytest.raises(RLVRError, match=r"decoder\.layers\.0\.mlp\.router\.weight has no Hugging Face counterpart"):
        WeightMap(GOOD).entry("decoder.layers.0.mlp.router.weight")


def test_layers_are_counted_over_the_whole_model() -> None:
    names, _ = WeightMap(GOOD, layer_offset=6).entry("decoder.layers.2.mlp.linear_fc2.weight")
    assert names == ["model.layers.8.mlp.down_proj.weight"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "llama"}, "is of type 'llama'; only dense 'qwen3' can be trained"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "has rope_type='yarn'; only 'default'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "has rope_type='linear'; only 'default'"),
        ({"attention_bias": True}, "has attention_bias=True; only False"),
        ({"use_sliding_window": True}, "has use_sliding_window=True; only False"),
        ({"hidden_act": "gelu"}, "has hidden_act='gelu'; only 'silu'"),
    ],
)
def test_models_that_cannot_be_trained(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(RLVRError) as refusal:
        read_hf_config(tmp_path)
    assert sentence in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read"),
        ("[]", "is of type None"),
        ('{"model_type": "qwen3", "vocab_size": 3}', "lacks hidden_size, intermediate_size,"),
    ],
)
def test_configurations_that_cannot_be_read(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RLVRError, match=sentence):
        read_hf_config(tmp_path)


def test_a_good_configuration_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert read_hf_config(tmp_path) == GOOD


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(RLVRError, match=r"policy\.model=.*gone has no config\.json; give a Hugging Face model dir"):
        read_hf_config(tmp_path / "gone")
    with pytest.raises(RLVRError, match=r"policy\.model=.*gone holds no \*\.safetensors file"):
        TensorReader(tmp_path / "gone")


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(8, 8), "b": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RLVRError, match=r"model\.safetensors is damaged .*download or export the model again"):
        TensorReader(tmp_path)


def test_tensors_are_found_in_whichever_file_holds_them(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0])}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.tensor([2.0])}, tmp_path / "model-2.safetensors")
    reader = TensorReader(tmp_path)
    assert (reader.read("a"), reader.read("b")) == (torch.tensor([1.0]), torch.tensor([2.0]))
    with pytest.raises(RLVRError, match="lacks the tensor c; its files are incomplete"):
        reader.read("c")
