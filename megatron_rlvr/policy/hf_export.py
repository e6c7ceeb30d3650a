"""The policy as a Hugging Face model directory, written shard by shard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

if TYPE_CHECKING:
    from megatron_rlvr.policy.policy import Policy

SHARD_BYTES = 5_000_000_000  # what the hub's tools write, too
_BESIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"),
)


def export_hf(policy: Policy, directory: Path) -> None:
    """Write the policy as a Hugging Face model directory; a collective call, rank 0 writes."""
    write_hf_model(policy.named_tensors(), policy.hf_config, Path(policy.config.model), directory)


def write_hf_model(
    tensors: Iterable[tuple[str, torch.Tensor]],
    hf_config: Mapping[str, Any],
    source: Path,
    directory: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a stream of tensors as a Hugging Face model directory; a collective call, rank 0 writes.

    Args:
        tensors: Names and full tensors, in any order; the ranks may have to draw them together.
        hf_config: The ``config.json``, but for the dtype, which is that of the tensors.
        source: The directory that the model came from, whose tokenizer is copied.
        directory: Where to write; ``model.safetensors`` or, of several files, ``model.safetensors.index.json`` appears
            last, so that its presence says that the directory is complete.
        shard_bytes: No file holds more, unless a single tensor does. This much is held in memory.
    """
    shards = _Shards(directory, shard_bytes) if dist.get_rank() == 0 else None
    dtype = ""
    for name, tensor in tensors:
        if shards is not None:
            dtype = dtype or str(tensor.dtype).removeprefix("torch.")
            shards.add(name, tensor)
    if shards is not None:
        for name in _BESIDE:
            if (source / name).exists():
                shutil.copy(source / name, directory / name)
        config = {**hf_config, "dtype": dtype, "torch_dtype": dtype}  # names of transformers 5 and 4
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        shards.commit()
    dist.barrier()


class _Shards:
    """The safetensors files of a model: tensors are collected until a file is full, files get their names last."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self._directory, self._shard_bytes = directory, shard_bytes
        self._unfinished = directory / "unfinished"
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.mkdir(parents=True)
        self._held: dict[str, torch.Tensor] = {}
        self._files: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._held and sum(held.nbytes for held in self._held.values()) + tensor.nbytes > self._shard_bytes:
            self._write()
        self._held[name] = tensor.cpu()
        self._total += tensor.nbytes

    def commit(self) -> None:
        self._write()
        for old in self._directory.glob("model*.safetensors*"):
            old.unlink()
        count = len(self._files)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        names = names if count > 1 else ["model.safetensors"]
        for i, name in enumerate(names):
            os.replace(self._unfinished / str(i), self._directory / name)
        if count > 1:
            weight_map = {tensor: name for name, file in zip(names, self._files, strict=True) for tensor in file}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._unfinished / "index").write_text(json.dumps(index, indent=2) + "\n")
            os.replace(self._unfinished / "index", self._directory / "model.safetensors.index.json")
        self._unfinished.rmdir()

    def _write(self) -> None:
        save_file(self._held, self._unfinished / str(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._held))
        self._held = {}
