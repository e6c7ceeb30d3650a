"""Hugging Face safetensors in and out of Megatron's tensor-parallel shards, one tensor at a time.

A `Layout` says how one Megatron parameter is made of Hugging Face tensors: `split` gives every tensor-parallel rank its
shard, `merge` is its inverse. Loading, saving and weight resync all go through these pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_rlvr.core import RLVRError

_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"),
)


class Layout(Protocol):
    """How the shards of one Megatron parameter and its Hugging Face tensors turn into each other."""

    def split(self, tensors: Sequence[torch.Tensor], parts: int) -> list[torch.Tensor]:
        """The shard of each of ``parts`` tensor-parallel ranks."""
        ...

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The full Hugging Face tensors of all ranks' shards, in rank order."""
        ...


class Replicated:
    """The same tensor on every rank (norms)."""

    def split(self, tensors: Sequence[torch.Tensor], parts: int) -> list[torch.Tensor]:
        """See `Layout.split`."""
        return [tensors[0]] * parts

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Layout.merge`."""
        return [shards[0]]


@dataclass(frozen=True)
class Sharded:
    """One tensor cut along ``dim``: output rows (0) or input columns (1)."""

    dim: int

    def split(self, tensors: Sequence[torch.Tensor], parts: int) -> list[torch.Tensor]:
        """See `Layout.split`."""
        return list(tensors[0].chunk(parts, self.dim))

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Layout.merge`."""
        return [torch.cat(list(shards), self.dim)]


@dataclass(frozen=True)
class VocabRows:
    """Embedding or head: rows cut over the ranks after zero rows fill the vocabulary up to a multiple of them."""

    vocab_size: int

    def split(self, tensors: Sequence[torch.Tensor], parts: int) -> list[torch.Tensor]:
        """See `Layout.split`."""
        missing = padded_vocab(self.vocab_size, parts) - self.vocab_size
        return list(torch.nn.functional.pad(tensors[0], (0, 0, 0, missing)).chunk(parts))

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Layout.merge`."""
        return [torch.cat(list(shards))[: self.vocab_size]]


class GateUp:
    """``linear_fc1``: every rank holds its gate rows, then its up rows."""

    def split(self, tensors: Sequence[torch.Tensor], parts: int) -> list[torch.Tensor]:
        """See `Layout.split`."""
        gate, up = (tensor.chunk(parts) for tensor in tensors)
        return [torch.cat(pair) for pair in zip(gate, up, strict=True)]

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Layout.merge`."""
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in (0, 1)]


@dataclass(frozen=True)
class QKV:
    """``linear_qkv``: for every query group its query heads, then its key head, then its value head."""

    query_heads: int
    kv_heads: int
    head_dim: int

    def split(self, tensors: Sequence[torch.Tensor], parts: int) -> list[torch.Tensor]:
        """See `Layout.split`."""
        grouped = [tensor.reshape(self.kv_heads, -1, *tensor.shape[1:]) for tensor in tensors]
        return [shard.flatten(0, 1) for shard in torch.cat(grouped, 1).chunk(parts)]

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Layout.merge`."""
        query = self.query_heads // self.kv_heads * self.head_dim
        whole = torch.cat(list(shards))
        grouped = whole.reshape(self.kv_heads, query + 2 * self.head_dim, *whole.shape[1:])
        return [part.flatten(0, 1) for part in torch.split(grouped, [query, self.head_dim, self.head_dim], 1)]


@dataclass(frozen=True)
class WeightMap:
    """Which Hugging Face tensors make up each Megatron parameter, for Qwen3-shaped dense models.

    Attributes:
        hf_config: The model's ``config.json``.
        layer_offset: Global index of this rank's first layer (0 without pipeline parallelism).
    """

    hf_config: dict[str, Any]
    layer_offset: int = 0

    def entry(self, name: str) -> tuple[list[str], Layout]:
        """Hugging Face names and layout of the Megatron parameter ``name``.

        Raises:
            RLVRError: If the parameter has no Hugging Face counterpart.
        """
        vocab = VocabRows(int(self.hf_config["vocab_size"]))
        top_level: dict[str, tuple[list[str], Layout]] = {
            "embedding.word_embeddings.weight": (["model.embed_tokens.weight"], vocab),
            "decoder.final_layernorm.weight": (["model.norm.weight"], Replicated()),
            "output_layer.weight": (["lm_head.weight"], vocab),
        }
        if name in top_level:
            return top_level[name]
        if name.startswith("decoder.layers."):
            index, _, suffix = name.removeprefix("decoder.layers.").partition(".")
            layers = self._layer_entries()
            if suffix in layers:
                names, layout = layers[suffix]
                return [f"model.layers.{int(index) + self.layer_offset}.{hf_name}" for hf_name in names], layout
        raise RLVRError(f"the Megatron parameter {name} has no Hugging Face counterpart; please report the model")

    def _layer_entries(self) -> dict[str, tuple[list[str], Layout]]:
        qkv = QKV(
            int(self.hf_config["num_attention_heads"]),
            int(self.hf_config["num_key_value_heads"]),
            int(self.hf_config["head_dim"]),
        )
        input_norm: tuple[list[str], Layout] = (["input_layernorm.weight"], Replicated())
        mlp_norm: tuple[list[str], Layout] = (["post_attention_layernorm.weight"], Replicated())
        return {
            "input_layernorm.weight": input_norm,
            "self_attention.linear_qkv.layer_norm_weight": input_norm,  # where TransformerEngine fuses it
            "self_attention.linear_qkv.weight": ([f"self_attn.{x}_proj.weight" for x in "qkv"], qkv),
            "self_attention.q_layernorm.weight": (["self_attn.q_norm.weight"], Replicated()),
            "self_attention.k_layernorm.weight": (["self_attn.k_norm.weight"], Replicated()),
            "self_attention.linear_proj.weight": (["self_attn.o_proj.weight"], Sharded(1)),
            "pre_mlp_layernorm.weight": mlp_norm,
            "mlp.linear_fc1.layer_norm_weight": mlp_norm,
            "mlp.linear_fc1.weight": (["mlp.gate_proj.weight", "mlp.up_proj.weight"], GateUp()),
            "mlp.linear_fc2.weight": (["mlp.down_proj.weight"], Sharded(1)),
        }


def padded_vocab(vocab_size: int, parts: int) -> int:
    """``vocab_size`` rounded up to a multiple of ``parts``."""
    return -(-vocab_size // parts) * parts


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a model directory, checked to be of a family that this package can train.

    Raises:
        RLVRError: If the directory or file is missing or unreadable, or the model is of another shape.
    """
    path = Path(directory) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise RLVRError(f"policy.model={directory} has no config.json; give a Hugging Face model directory") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RLVRError(f"{path} cannot be read ({error}); download the model directory again") from None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type != "qwen3":
        raise RLVRError(f"policy.model={directory} is of type {model_type!r}; only dense 'qwen3' can be trained")
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise RLVRError(f"{path} lacks {', '.join(missing)}; take the config.json that belongs to the weights")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))  # "type" is the older spelling
    for key, value, wanted in (
        ("rope_type", rope_type, "default"),
        ("attention_bias", config.get("attention_bias", False), False),
        ("use_sliding_window", config.get("use_sliding_window", False), False),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
    ):
        if value != wanted:
            raise RLVRError(f"policy.model={directory} has {key}={value!r}; only {wanted!r} is supported so far")
    return config


class TensorReader:
    """Reads single tensors from a model directory's safetensors files without loading the rest."""

    def __init__(self, directory: str | Path) -> None:
        """Index the directory's files.

        Raises:
            RLVRError: If there are none, or one is not a safetensors file.
        """
        self._file_of: dict[str, Path] = {}
        for path in sorted(Path(directory).glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    self._file_of.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise RLVRError(f"{path} is damaged ({error}); download or export the model again") from None
        if not self._file_of:
            raise RLVRError(f"policy.model={directory} holds no *.safetensors file; convert or download the weights")
        self._directory = directory

    def read(self, name: str) -> torch.Tensor:
        """The tensor called ``name``, on the CPU.

        Raises:
            RLVRError: If no file holds it.
        """
        if name not in self._file_of:
            raise RLVRError(f"policy.model={self._directory} lacks the tensor {name}; its files are incomplete")
        with safe_open(self._file_of[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def load_weights(module: torch.nn.Module, weights: WeightMap, reader: TensorReader, *, rank: int, parts: int) -> None:
    """Fill ``module``'s parameters with this rank's shards, one parameter at a time.

    Args:
        module: The unwrapped Megatron model of this rank.
        weights: Names and layouts.
        reader: The source.
        rank: Tensor-parallel rank.
        parts: Tensor-parallel size.

    Raises:
        RLVRError: If a tensor is missing or has another shape than the model.
    """
    for name, parameter in module.named_parameters():
        hf_names, layout = weights.entry(name)
        shard = layout.split([reader.read(hf_name) for hf_name in hf_names], parts)[rank]
        if shard.shape != parameter.shape:
            raise RLVRError(
                f"{' + '.join(hf_names)} gives a shard of shape {tuple(shard.shape)} where the model built from "
                f"config.json has {tuple(parameter.shape)}; config.json and the weights do not belong together"
            )
        with torch.no_grad():
            parameter.copy_(shard)


def named_full_tensors(
    module: torch.nn.Module, weights: WeightMap, group: torch.distributed.ProcessGroup
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream the model as full tensors under Hugging Face names; a collective call over ``group``.

    Args:
        module: The unwrapped Megatron model of this rank.
        weights: Names and layouts.
        group: The tensor-parallel group; every rank of it receives every tensor.

    Yields:
        Hugging Face name and full tensor on this rank's device. Only one parameter is gathered at a time.
    """
    parts = torch.distributed.get_world_size(group)
    for name, parameter in module.named_parameters():
        hf_names, layout = weights.entry(name)
        local = parameter.detach().contiguous()
        if parts == 1 or isinstance(layout, Replicated):
            shards = [local]
        else:
            shards = [torch.empty_like(local) for _ in range(parts)]
            torch.distributed.all_gather(shards, local, group=group)
        yield from zip(hf_names, (tensor.contiguous() for tensor in layout.merge(shards)), strict=True)
