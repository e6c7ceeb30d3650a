"""Process groups and devices: one set of functions for NCCL on GPUs and gloo on CPUs."""

from __future__ import annotations

import importlib
import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_rlvr.core import RLVRError
from megatron_rlvr.policy import cpu_runtime

# A rank that waits longer than this for the others has lost them; rollouts and verification happen in between.
_TIMEOUT = timedelta(minutes=30)


def device() -> torch.device:
    """Where this rank computes: its own GPU, or the CPU where CUDA does not work."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def initialize(
    *,
    tensor_parallel: int,
    data_parallel: int,
    pipeline_parallel: int = 1,
    virtual_pipeline: int = 1,
    context_parallel: int = 1,
    seed: int,
) -> None:
    """Join the process group that torchrun (or srun) described and lay out Megatron's parallel groups.

    Args:
        tensor_parallel: Ranks that share every layer.
        data_parallel: Copies of the model.
        pipeline_parallel: Stages that the layers are split over.
        virtual_pipeline: Chunks of layers on each stage.
        context_parallel: Ranks that share every sequence.
        seed: Seed of Megatron's RNG tracker.

    Raises:
        RLVRError: If the number of processes is not the product of the layout.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layout = {
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "context_parallel": context_parallel,
        "data_parallel": data_parallel,
    }
    wanted = math.prod(layout.values())
    if world != wanted:
        product = " x ".join(f"policy.{name}={size}" for name, size in layout.items())
        raise RLVRError(f"{world} trainer processes were started for {product}; start {wanted} or change the layout")
    cpu_runtime.install()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
        context_parallel_size=context_parallel,
    )
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leave the process group; harmless when it was never joined."""
    if not dist.is_initialized():
        return
    importlib.import_module("megatron.core.parallel_state").destroy_model_parallel()
    dist.destroy_process_group()
