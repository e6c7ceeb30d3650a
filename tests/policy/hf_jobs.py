"""What the ranks of the Hugging Face tests do; imported by the nursery only, because it imports Megatron-Core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.cli import main
from megatron_rlvr.config import PolicyConfig
from megatron_rlvr.policy import cpu_runtime, parallel

cpu_runtime.install()

from megatron_rlvr.policy.checkpoint import save_policy  # noqa: E402
from megatron_rlvr.policy.hf_export import write_hf_model  # noqa: E402
from megatron_rlvr.policy.policy import Policy  # noqa: E402

SHARD_BYTES = 30_000


def families(models: dict[str, str], batch_file: str, layout: dict[str, Any], export: str, temperature: float) -> Any:
    """For each model: log-probs, the weights, and those of a policy loaded from what this one exported in shards."""
    initialize(layout)
    batch = torch.load(batch_file)
    results = {}
    for case, model in models.items():
        policy = build(model, layout, temperature)
        directory = Path(export) / case
        write_hf_model(policy.named_tensors(), policy.hf_config, Path(model), directory, shard_bytes=SHARD_BYTES)
        results[case] = {
            "logprobs": policy.log_probs(batch["tokens_BL"], batch["mask_BL"]).logprobs_BL,
            "weights": weights_of(policy),
            "again": weights_of(build(str(directory), layout, temperature)),
        }
    return results


def checkpoint(model: str, layout: dict[str, Any], directory: str) -> dict[str, torch.Tensor]:
    """The weights, altered so that no model directory has them, of a checkpoint saved in a layout."""
    initialize(layout)
    policy = build(model, layout, 1.0)
    with torch.no_grad():
        for module in policy.modules:
            for parameter in module.parameters():
                parameter.mul_(1.5)
    save_policy(policy, Path(directory))
    return weights_of(policy)


def initialize(layout: dict[str, Any]) -> None:
    """Join the groups of a layout, given as keys of PolicyConfig."""
    sizes = {"tensor_parallel": 1, "data_parallel": 1, **layout}
    parallel.initialize(**{key: size for key, size in sizes.items() if key != "precision"}, seed=0)


def build(model: str, layout: dict[str, Any], temperature: float) -> Policy:
    """A policy in a layout."""
    config = PolicyConfig(model=model, learning_rate=1e-3, micro_batch=2, **layout)
    return Policy(config, temperature=temperature, total_steps=1)


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    """Copies of the streamed weights."""
    return {name: tensor.clone() for name, tensor in policy.named_tensors()}


def convert(runs: dict[str, list[str]]) -> list[int]:
    """Exit codes of ``megatron-rlvr convert`` for several sources and outputs, in a process without a process group."""
    torch.distributed.destroy_process_group()
    return [main(["convert", source, output]) for source, output in runs.values()]
