"""The policy's part of a checkpoint: Megatron's distributed format, and the Hugging Face export."""

from __future__ import annotations

import json
import os
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors.torch import save_file

from megatron_rlvr.core import RLVRError
from megatron_rlvr.policy.policy import Policy

_HF_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"),
)


def save_policy(policy: Policy, directory: Path) -> None:
    """Write weights, optimizer, schedule and this rank's RNG into the existing ``directory``; a collective call."""
    if dist.get_rank() == 0:
        (directory / "policy").mkdir()
    dist.barrier()
    # Saving is synchronous, so the writers' results never leave this process. Megatron's default is a queue in a
    # manager process, which takes seconds to start and stays behind for good when this rank is killed.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(_sharded_state(policy, is_loading=False), str(directory / "policy"))
    torch.save(_rng_state(), directory / _rng_file())


def load_policy(policy: Policy, directory: Path) -> None:
    """Restore what `save_policy` wrote; a collective call.

    Raises:
        RLVRError: If the checkpoint was made by another number of ranks.
    """
    # Every rank counts, so that all of them refuse: one that raised alone would leave the others waiting for it.
    saved = len(list(directory.glob("rng_*.pt")))
    if saved != dist.get_world_size():
        raise RLVRError(
            f"{directory} was saved by {saved} rank(s) and cannot be resumed by {dist.get_world_size()}; "
            "use the policy.tensor_parallel and policy.data_parallel of the saved run"
        )
    state = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(directory / "policy"))
    policy.module.load_state_dict(state["model"])
    policy.optimizer.load_state_dict(state["optimizer"])
    policy.schedule.load_state_dict(state["schedule"])
    rng = torch.load(directory / _rng_file(), weights_only=True)
    torch.set_rng_state(rng["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    get_cuda_rng_tracker().set_states(rng["megatron"])


def export_hf(policy: Policy, directory: Path) -> None:
    """Write the policy as a Hugging Face model directory; a collective call, rank 0 writes."""
    tensors = {name: tensor.cpu() for name, tensor in policy.named_tensors()}
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for name in _HF_FILES:
            if (Path(policy.config.model) / name).exists():
                shutil.copy(Path(policy.config.model) / name, directory / name)
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        config = policy.hf_config | {"dtype": dtype, "torch_dtype": dtype}  # names of transformers 5 and 4
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        # Written last and under its final name only when complete: that a run is finished is read from this file.
        save_file(tensors, directory / "model.unfinished", metadata={"format": "pt"})
        os.replace(directory / "model.unfinished", directory / "model.safetensors")
    dist.barrier()


def _sharded_state(policy: Policy, *, is_loading: bool) -> dict[str, Any]:
    model = policy.module.sharded_state_dict()  # type: ignore[operator]
    return {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(model, is_loading=is_loading),
        "schedule": policy.schedule.state_dict(),
    }


def _rng_file() -> str:
    return f"rng_{dist.get_rank()}.pt"


def _rng_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }
