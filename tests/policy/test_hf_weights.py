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
from megatron_rlvr.policy.architecture import padded_vocab
from megatron_rlvr.policy.hf_layouts import QKV, Columns, GateUp, Layout, Replicated, VocabRows
from megatron_rlvr.policy.hf_weights import TensorReader, WeightMap, load_weights, read_hf_config

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
    shards = [layout.shard(tensors, rank, parts) for rank in range(parts)]
    assert len({shard.shape for shard in shards}) == 1
    merged = layout.merge(shards)
    assert len(merged) == len(tensors)
    assert all(torch.equal(got, wanted) for got, wanted in zip(merged, tensors, strict=True))
    return shards


@given(parts=small, rows=small, columns=small)
@settings(deadline=None)
def test_columns(parts: int, rows: int, columns: int) -> None:
    shards = check_round_trip(Columns(), [numbered(rows, columns * parts)], parts)
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
    # A bias is laid out like a column of the weight.
    bias = check_round_trip(QKV(query_heads, kv_heads, head), [part[:, 0] for part in (query, key, value)], parts)
    assert torch.equal(torch.cat(bias), torch.cat(shards)[:, 0])
    for group, block in enumerate(torch.cat(shards).chunk(kv_heads)):
        own, queries = slice(group * head, (group + 1) * head), slice(group * ratio * head, (group + 1) * ratio * head)
        assert torch.equal(block, torch.cat([query[queries], key[own], value[own]]))


def test_a_parameter_without_counterpart() -> None:
    with pytest.raises(RLVRError, match=r"decoder\.layers\.0\.mlp\.router\.weight has no Hugging Face counterpart"):
        WeightMap(GOOD).entry("decoder.layers.0.mlp.router.weight")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"model_type": "mistral"},
            "is of type 'mistral'; only the dense families 'qwen2' (Qwen2 and Qwen2.5), 'qwen3' (Qwen3), "
            "'llama' (Llama) can be trained",
        ),
        ({"model_type": "qwen3_moe"}, "is of type 'qwen3_moe'; only the dense families"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "has rope_type='yarn'; of Qwen3 models only those with one of default, linear, llama3 are supported",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "has rope_type='dynamic'; of Qwen3 models"),
        (
            {"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "has rope_type='llama3' without low_freq_factor, high_freq_factor, original_max_position_embeddings",
        ),
        ({"attention_bias": True}, "has attention_bias=True; of Qwen3 models only those with False are supported"),
        ({"model_type": "llama", "mlp_bias": True}, "has mlp_bias=True; of Llama models only those with False"),
        ({"use_sliding_window": True}, "has use_sliding_window=True; of Qwen3 models only those with False"),
        ({"hidden_act": "gelu"}, "has hidden_act='gelu'; of Qwen3 models only those with 'silu'"),
        ({"partial_rotary_factor": 0.5}, "has partial_rotary_factor=0.5; of Qwen3 models only those with 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "has partial_rotary_factor=0.5; of Qwen3 models only"),
        (
            {"dual_chunk_attention_config": {}},
            "has dual_chunk_attention_config={}; of Qwen3 models only those with None",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "has quantization_config={'quant_method': 'fp8'}; of Qwen3"),
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
    assert (reader.source("a")[:], reader.source("b")[:]) == (torch.tensor([1.0]), torch.tensor([2.0]))
    with pytest.raises(RLVRError, match="lacks the tensor c; its files are incomplete"):
        reader.source("c")


class Stage(torch.nn.Module):
    """The parameters of one rank's pipeline stage of the model of GOOD with four layers."""

    def __init__(self, layers: range, parts: int, *, first: bool, last: bool) -> None:
        super().__init__()

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.full(shape, torch.nan))

        def group(**members: Any) -> torch.nn.Module:
            module = torch.nn.Module()
            for name, member in members.items():
                setattr(module, name, member)
            return module

        def layer(number: int) -> torch.nn.Module:
            attention = group(
                linear_qkv=group(weight=parameter(32 // parts, 8)),
                linear_proj=group(weight=parameter(8, 16 // parts)),
                q_layernorm=group(weight=parameter(4)),
                k_layernorm=group(weight=parameter(4)),
            )
            mlp = group(
                linear_fc1=group(weight=parameter(32 // parts, 8)), linear_fc2=group(weight=parameter(8, 16 // parts))
            )
            norms = {f"{name}_layernorm": group(weight=parameter(8)) for name in ("input", "pre_mlp")}
            return group(self_attention=attention, mlp=mlp, layer_number=number, **norms)

        self.decoder = group(layers=torch.nn.ModuleList(layer(index + 1) for index in layers))
        if first:
            self.embedding = group(word_embeddings=group(weight=parameter(32 // parts, 8)))
        if last:
            self.decoder.final_layernorm = group(weight=parameter(8))
            self.output_layer = group(weight=parameter(32 // parts, 8))


def write_four_layers(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and tensors of a model whose elements are all different."""
    config = GOOD | {"num_hidden_layers": 4, "tie_word_embeddings": False}
    shapes = {"self_attn.q_proj": (16, 8), "self_attn.k_proj": (8, 8), "self_attn.v_proj": (8, 8)}
    shapes |= {"self_attn.o_proj": (8, 16), "mlp.gate_proj": (16, 8), "mlp.up_proj": (16, 8), "mlp.down_proj": (8, 16)}
    norms = {"self_attn.q_norm": (4,), "self_attn.k_norm": (4,), "input_layernorm": (8,)}
    every = shapes | norms | {"post_attention_layernorm": (8,)}
    named = {f"model.layers.{i}.{name}.weight": shape for i in range(4) for name, shape in every.items()}
    named |= {"model.embed_tokens.weight": (32, 8), "lm_head.weight": (32, 8), "model.norm.weight": (8,)}
    starts = iter(range(0, 10_000 * len(named), 10_000))
    tensors = {name: numbered(*shape, start=next(starts)).float() for name, shape in named.items()}
    save_file(tensors, directory / "model.safetensors")
    return config, tensors


def test_a_stage_takes_its_layers_and_reads_no_more_than_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensor-parallel ranks in each of two stages: together they read the file once, and the norms twice."""
    config, tensors = write_four_layers(tmp_path)
    read: list[torch.Tensor] = []
    plain = TensorReader.source

    class Counting:
        def __init__(self, source: Any) -> None:
            self.source, self.shape = source, source.shape

        def __getitem__(self, index: Any) -> torch.Tensor:
            read.append(self.source[index])
            return read[-1]

    monkeypatch.setattr(TensorReader, "source", lambda reader, name: Counting(plain(reader, name)))
    total = 0
    for first, layers in ((True, range(2)), (False, range(2, 4))):
        for rank in range(2):
            read.clear()
            stage = Stage(layers, 2, first=first, last=not first)
            load_weights(stage, WeightMap(config), TensorReader(tmp_path), rank=rank, parts=2)
            held = sum(parameter.numel() for parameter in stage.parameters())
            assert all(parameter.isfinite().all() for parameter in stage.parameters())
            assert sum(part.numel() for part in read) == held
            total += held
            down = tensors[f"model.layers.{layers[1]}.mlp.down_proj.weight"]
            mine = stage.get_parameter("decoder.layers.1.mlp.linear_fc2.weight")
            assert torch.equal(mine, down[:, rank * 8 : (rank + 1) * 8])
    norms = sum(tensor.numel() for tensor in tensors.values() if tensor.ndim == 1)
    assert total == sum(tensor.numel() for tensor in tensors.values()) + norms


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.9.mlp.up_proj.weight", False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
    ],
)
def test_tensors_that_the_model_has_no_place_for(tmp_path: Path, name: str, accepted: bool) -> None:
    config, tensors = write_four_layers(tmp_path)
    save_file(tensors | {name: torch.ones(16)}, tmp_path / "model.safetensors")
    stage = Stage(range(4), 1, first=True, last=True)
    if accepted:
        load_weights(stage, WeightMap(config), TensorReader(tmp_path), rank=0, parts=1)
    else:
        with pytest.raises(RLVRError, match=rf"holds the tensor {name}, which a model of its config.json does not hav"):
            load_weights(stage, WeightMap(config), TensorReader(tmp_path), rank=0, parts=1)
