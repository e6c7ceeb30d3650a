"""What the ranks of the policy's tests do; imported by the nursery only, because it imports Megatron-Core."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from megatron_rlvr.policy import cpu_runtime

cpu_runtime.install()

from megatron_rlvr.config import ObjectiveConfig, PolicyConfig  # noqa: E402
from megatron_rlvr.core import RolloutBatch, StepMetrics  # noqa: E402
from megatron_rlvr.entropy import EntropyGuided  # noqa: E402
from megatron_rlvr.objective import policy_loss  # noqa: E402
from megatron_rlvr.policy import parallel  # noqa: E402
from megatron_rlvr.policy.hf_weights import named_full_tensors  # noqa: E402
from megatron_rlvr.policy.policy import Policy, TrainingRows  # noqa: E402
from megatron_rlvr.training.phases import PreparedBatch, minibatches, prepare  # noqa: E402

Tensors = dict[str, torch.Tensor]
CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def weights_of(policy: Policy) -> Tensors:
    return {name: tensor.clone() for name, tensor in policy.named_tensors()}


def layout(
    model: str, layouts: tuple[int, int], batch_file: str, micro_batches: list[int], options: dict[str, Any], lr: float
) -> dict[int, Any]:
    tp, dp = layouts
    parallel.initialize(tensor_parallel=tp, data_parallel=dp, seed=0)
    batch = torch.load(batch_file)
    return {size: one_step(config(model, layouts, size, options, lr), batch) for size in micro_batches}


def config(model: str, layouts: tuple[int, int], micro_batch: int, options: dict[str, Any], lr: float) -> PolicyConfig:
    return PolicyConfig(
        model=model,
        tensor_parallel=layouts[0],
        data_parallel=layouts[1],
        micro_batch=micro_batch,
        learning_rate=lr,
        megatron=options,
    )


def one_step(settings: PolicyConfig, batch: Tensors) -> dict[str, Any]:
    """A training step without the rollout: log-probs, advantages, three updates, the controller."""
    policy = Policy(settings, temperature=0.8, total_steps=10)
    prepared, step = prepare_batch(policy, batch)
    controller = EntropyGuided(target=1.0, initial=0.5)
    loss = partial(policy_loss, **CLIP, positive_weight=controller.value)
    updates = []
    for rows in minibatches(prepared, ObjectiveConfig(minibatches=3), seed=1):
        metrics = StepMetrics()
        policy.update(rows, loss, metrics)
        updates.append(policy.reduce_metrics(metrics).means())
    controller.update(prepared.entropy)
    policy.step_schedule()
    return {
        "logprobs": prepared.rows.old_logprobs_BL,
        "entropy": step["entropy_BL"],
        "mean_entropy": prepared.entropy,
        "positive_weight": controller.value,
        "updates": updates,
        "weights": weights_of(policy),
        "learning_rate": policy.learning_rate,
    }


def prepare_batch(policy: Policy, batch: Tensors) -> tuple[PreparedBatch, Tensors]:
    rollout = RolloutBatch(
        tokens_BL=batch["tokens_BL"],
        response_mask_BL=batch["response_mask_BL"],
        rollout_logprobs_BL=torch.zeros(batch["tokens_BL"].shape),
        groups_B=batch["groups_B"],
        rewards_B=batch["rewards_B"],
        valid_B=batch["valid_B"],
        weight_version=0,
    )
    logprobs_BL, entropy_BL = policy.log_probs(rollout.tokens_BL, rollout.response_mask_BL)
    return prepare(rollout, logprobs_BL, entropy_BL, StepMetrics()), {"entropy_BL": entropy_BL}
