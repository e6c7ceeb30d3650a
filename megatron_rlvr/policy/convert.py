"""A run's Megatron checkpoint as a Hugging Face model, in one process whatever the layout of the run."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_rlvr.config import PolicyConfig
from megatron_rlvr.policy import model as megatron
from megatron_rlvr.policy import parallel
from megatron_rlvr.policy.architecture import Architecture
from megatron_rlvr.policy.hf_export import write_hf_model
from megatron_rlvr.policy.hf_weights import WeightMap, named_full_tensors, read_hf_config


def convert_checkpoint(config: PolicyConfig, checkpoint: Path, directory: Path) -> None:
    """Write the weights of a checkpoint as a Hugging Face model directory.

    Megatron's distributed checkpoint holds every parameter under its global name and shape, so one process loads what
    any layout saved. Optimizer and random states are not read.

    Args:
        config: The policy of the run that wrote the checkpoint; its layout does not matter.
        checkpoint: A directory that `checkpoint.save_policy` filled.
        directory: Where to write.

    Raises:
        RLVRError: If the model directory of the run is gone.
    """
    hf_config = read_hf_config(config.model)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        parallel.initialize(tensor_parallel=1, data_parallel=1, seed=0)
        module = _load(config, Architecture.of(hf_config), checkpoint)
        tensors = named_full_tensors(
            [module], WeightMap(hf_config), megatron.tensor_parallel_group(), megatron.pipeline_parallel_group()
        )
        write_hf_model(tensors, hf_config, Path(config.model), directory)
    finally:
        parallel.shutdown()


def _load(config: PolicyConfig, architecture: Architecture, checkpoint: Path) -> torch.nn.Module:
    alone = PolicyConfig(model=config.model, precision=config.precision, megatron={"perform_initialization": False})
    transformer = megatron.transformer_config(alone, architecture)
    module = architecture.build(transformer, megatron.layer_spec(architecture), tensor_parallel=1)
    module = module.to(parallel.device(), transformer.params_dtype)
    state = dist_checkpointing.load({"model": module.sharded_state_dict()}, str(checkpoint / "policy"))  # type: ignore[operator]
    module.load_state_dict(state["model"])
    return module
