"""Hugging Face safetensors in and out of Megatron's shards, one tensor at a time and no more than this rank's share.

Megatron parameters are called by their global names here: layers are counted over the whole model, whichever pipeline
stage holds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from megatron_rlvr.core import RLVRError
from megatron_rlvr.policy.architecture import Architecture
from megatron_rlvr.policy.hf_layouts import QKV, Columns, GateUp, Layout, Replicated, VocabRows

_Entry = tuple[list[str], Layout]
_LAYERS = "decoder.layers."


class WeightMap:
    """Which Hugging Face tensors make up each Megatron parameter."""

    def __init__(self, hf_config: dict[str, Any]) -> None:
        """Lay out the names for a model.

        Args:
            hf_config: The model's ``config.json``.

        Raises:
            RLVRError: If the model is of no supported family.
        """
        self._architecture = Architecture.of(hf_config)
        vocab = VocabRows(self._architecture.vocab_size)
        head = "model.embed_tokens.weight" if self._architecture.tied else "lm_head.weight"
        self._top_level: dict[str, _Entry] = {
            "embedding.word_embeddings.weight": (["model.embed_tokens.weight"], vocab),
            "decoder.final_layernorm.weight": (["model.norm.weight"], Replicated()),
            "output_layer.weight": ([head], vocab),
        }
        self._layer = self._layer_entries(self._architecture)

    def entry(self, name: str) -> _Entry:
        """Hugging Face names and layout of the Megatron parameter of this global name.

        Raises:
            RLVRError: If the parameter has no Hugging Face counterpart.
        """
        if name in self._top_level:
            return self._top_level[name]
        index, _, suffix = name.removeprefix(_LAYERS).partition(".")
        if name.startswith(_LAYERS) and suffix in self._layer:
            names, layout = self._layer[suffix]
            return [f"model.layers.{index}.{hf_name}" for hf_name in names], layout
        raise RLVRError(f"the Megatron parameter {name} has no Hugging Face counterpart; please report the model")

    def hf_names(self) -> set[str]:
        """The names of all tensors of the model."""
        top = {name for names, _ in self._top_level.values() for name in names}
        layer = [name for names, _ in self._layer.values() for name in names]
        return top | {f"model.layers.{i}.{name}" for i in range(self._architecture.layers) for name in layer}

    @staticmethod
    def _layer_entries(shape: Architecture) -> dict[str, _Entry]:
        qkv = QKV(shape.query_heads, shape.kv_heads, shape.head_dim)
        input_norm: _Entry = (["input_layernorm.weight"], Replicated())
        mlp_norm: _Entry = (["post_attention_layernorm.weight"], Replicated())
        entries: dict[str, _Entry] = {
            "input_layernorm.weight": input_norm,
            "self_attention.linear_qkv.layer_norm_weight": input_norm,  # where TransformerEngine fuses it
            "self_attention.linear_qkv.weight": ([f"self_attn.{x}_proj.weight" for x in "qkv"], qkv),
            "self_attention.linear_proj.weight": (["self_attn.o_proj.weight"], Columns()),
            "pre_mlp_layernorm.weight": mlp_norm,
            "mlp.linear_fc1.layer_norm_weight": mlp_norm,
            "mlp.linear_fc1.weight": (["mlp.gate_proj.weight", "mlp.up_proj.weight"], GateUp()),
            "mlp.linear_fc2.weight": (["mlp.down_proj.weight"], Columns()),
        }
        if shape.qkv_bias:
            entries["self_attention.linear_qkv.bias"] = ([f"self_attn.{x}_proj.bias" for x in "qkv"], qkv)
        if shape.qk_norm:
            for x in "qk":
                entries[f"self_attention.{x}_layernorm.weight"] = ([f"self_attn.{x}_norm.weight"], Replicated())
        return entries


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
    Architecture.of(config, directory)
    return config


@dataclass(frozen=True)
class _FileTensor:
    """A tensor in a safetensors file, of which only the indexed part is read; see `hf_layouts.Source`."""

    view: Any  # safetensors' PySafeSlice

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.view.get_shape())

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor:
        part: torch.Tensor = self.view[index]
        return part


class TensorReader:
    """Reads parts of single tensors from a model directory's safetensors files without loading the rest."""

    def __init__(self, directory: str | Path) -> None:
        """Open the directory's files; their contents stay on the disk.

        Raises:
            RLVRError: If there are none, or one is not a safetensors file.
        """
        self._file_of: dict[str, Any] = {}
        for path in sorted(Path(directory).glob("*.safetensors")):
            try:
                file: Any = safe_open(path, "pt")
                self._file_of.update(dict.fromkeys(file.keys(), file))
            except (SafetensorError, OSError) as error:
                raise RLVRError(f"{path} is damaged ({error}); download or export the model again") from None
        if not self._file_of:
            raise RLVRError(f"policy.model={directory} holds no *.safetensors file; convert or download the weights")
        self.directory = directory

    def source(self, name: str) -> _FileTensor:
        """The tensor called ``name``; its parts come on the CPU.

        Raises:
            RLVRError: If no file holds it.
        """
        if name not in self._file_of:
            raise RLVRError(f"policy.model={self.directory} lacks the tensor {name}; its files are incomplete")
        return _FileTensor(self._file_of[name].get_slice(name))

    def check_names(self, known: set[str]) -> None:
        """Refuse tensors that the model has no place for: it would compute something else than it was trained to.

        Raises:
            RLVRError: Naming one of them.
        """
        # A tied head repeats the embedding, and old Llama files carry the frequencies that config.json fixes.
        ignored = {"lm_head.weight", *(name for name in self._file_of if name.endswith(".rotary_emb.inv_freq"))}
        strangers = sorted(self._file_of.keys() - known - ignored)
        if strangers:
            raise RLVRError(
                f"policy.model={self.directory} holds the tensor {strangers[0]}, which a model of its config.json does "
                "not have; config.json and the weights do not belong together"
            )


def load_weights(module: torch.nn.Module, weights: WeightMap, reader: TensorReader, *, rank: int, parts: int) -> None:
    """Fill ``module``'s parameters with this rank's shards, one parameter at a time, reading nothing else.

    Args:
        module: The unwrapped Megatron model, or a pipeline stage or chunk of it.
        weights: Names and layouts.
        reader: The source.
        rank: Tensor-parallel rank.
        parts: Tensor-parallel size.

    Raises:
        RLVRError: If a tensor is missing, has another shape than the model, or has no place in it.
    """
    reader.check_names(weights.hf_names())
    for name, parameter in global_parameters(module):
        hf_names, layout = weights.entry(name)
        sources = [reader.source(hf_name) for hf_name in hf_names]
        wanted = layout.merge([torch.empty_like(parameter, device="meta")] * parts)
        for hf_name, source, full in zip(hf_names, sources, wanted, strict=True):
            if source.shape != full.shape:
                raise RLVRError(
                    f"{hf_name} has the shape {tuple(source.shape)} where the model built from config.json has "
                    f"{tuple(full.shape)}; config.json and the weights do not belong together"
                )
        shard = layout.shard(sources, rank, parts)
        with torch.no_grad():
            parameter.copy_(shard)
            # What TransformerEngine keeps beside an FP8 parameter, and the optimizer starts from.
            precise = getattr(parameter, "get_high_precision_init_val", None)
            if precise is not None:
                precise().copy_(shard)


def global_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """``module``'s parameters with their layers counted over the whole model, from 0."""
    for name, parameter in module.named_parameters():
        if name.startswith(_LAYERS):
            index, _, suffix = name.removeprefix(_LAYERS).partition(".")
            layer: Any = module.get_submodule(f"{_LAYERS}{index}")
            yield f"{_LAYERS}{layer.layer_number - 1}.{suffix}", parameter
        else:
            yield name, parameter


def _values(parameter: torch.nn.Parameter) -> torch.Tensor:
    value = parameter.detach()
    return value if type(value) is torch.Tensor else value.dequantize()  # TransformerEngine's FP8 parameters


def named_full_tensors(
    modules: Sequence[torch.nn.Module],
    weights: WeightMap,
    tensor_group: dist.ProcessGroup,
    pipeline_group: dist.ProcessGroup,
    *,
    value: Callable[[torch.nn.Parameter], torch.Tensor] = _values,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream the model as full tensors under Hugging Face names; a collective call over both groups.

    Args:
        modules: This rank's unwrapped Megatron modules: one, or a chunk for each virtual pipeline stage.
        weights: Names and layouts.
        tensor_group: The tensor-parallel group.
        pipeline_group: The pipeline-parallel group.
        value: What of a parameter to stream; a tensor of its shape.

    Yields:
        Hugging Face name and full tensor on this rank's device, on every rank, stage by stage. Only one parameter is
        gathered at a time.
    """
    own = {name: value(parameter) for module in modules for name, parameter in global_parameters(module)}
    parts, stage = dist.get_world_size(tensor_group), dist.get_rank(pipeline_group)
    seen: set[str] = set()
    for owner, stage_tensors in enumerate(_of_every_stage(own, pipeline_group)):
        for name, (shape, dtype) in stage_tensors.items():
            hf_names, layout = weights.entry(name)
            if seen.issuperset(hf_names):  # the last stage's copy of a tied embedding
                continue
            seen.update(hf_names)
            local = own[name].contiguous() if owner == stage else torch.empty(shape, dtype=dtype, device=_device(own))
            if dist.get_world_size(pipeline_group) > 1:
                dist.broadcast(local, group=pipeline_group, group_src=owner)
            shards = [local]
            if parts > 1 and not isinstance(layout, Replicated):
                shards = [torch.empty_like(local) for _ in range(parts)]
                dist.all_gather(shards, local, group=tensor_group)
            yield from zip(hf_names, (tensor.contiguous() for tensor in layout.merge(shards)), strict=True)


def _of_every_stage(
    own: dict[str, torch.Tensor], group: dist.ProcessGroup
) -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
    """Names, shard shapes and dtypes of every pipeline stage's parameters."""
    mine = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
    stages = [mine] * dist.get_world_size(group)
    if len(stages) > 1:
        dist.all_gather_object(stages, mine, group=group)
    return stages


def _device(tensors: dict[str, torch.Tensor]) -> torch.device:
    return next(iter(tensors.values())).device
