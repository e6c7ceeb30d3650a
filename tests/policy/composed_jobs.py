"""What the ranks of ``test_composed_layouts`` do: whole steps without rollout, of several compositions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from policy_jobs import initialize, weights_of

from megatron_rlvr.config import load_config
from megatron_rlvr.core import RolloutBatch, StepMetrics
from megatron_rlvr.entropy import Attribution
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.training.composition import compose_run
from megatron_rlvr.training.phases import minibatches, prepare, weigh

STEPS = 2


def steps(policy: dict[str, Any], batch_file: str, compositions: dict[str, list[str]]) -> dict[str, Any]:
    """What two steps of every composition compute and leave."""
    initialize(policy)
    batch = torch.load(batch_file)
    return {name: composed(policy, batch, overrides) for name, overrides in compositions.items()}


def composed(settings: dict[str, Any], batch: dict[str, torch.Tensor], overrides: list[str]) -> dict[str, Any]:
    """The trainer's step between verification and resync, twice on the same rows."""
    keys = [f"policy.{name}={value}" for name, value in settings.items() if name != "megatron"]
    keys += [f"policy.megatron.{name}={value}" for name, value in settings["megatron"].items()]
    sizes = ["rollout.prompts=6", "rollout.samples_per_prompt=4", "rollout.max_new_tokens=9", "objective.minibatches=2"]
    config = load_config(None, ["run.dir=r", "data.train=countdown:train", *keys, *sizes, *overrides])
    composition = compose_run(config, prompts=8)
    policy = Policy(config.policy, temperature=1.0, total_steps=10, keep_reference=config.objective.kl > 0)
    control, attribution, record = composition.recipe.control, Attribution(), []
    for step in range(STEPS):
        metrics = StepMetrics()
        token_pass = policy.log_probs(batch["tokens_BL"], batch["response_mask_BL"], nucleus=composition.recipe.nucleus)
        rollout = RolloutBatch(
            tokens_BL=batch["tokens_BL"],
            response_mask_BL=batch["response_mask_BL"],
            rollout_logprobs_BL=token_pass.logprobs_BL + batch["drift_BL"],
            groups_B=batch["groups_B"],
            rewards_B=batch["rewards_B"],
            valid_B=batch["valid_B"],
            versions_BL=torch.zeros_like(batch["tokens_BL"], dtype=torch.int32),
            truncated_B=torch.zeros_like(batch["valid_B"]),
        )
        reference = (rollout.tokens_BL, rollout.response_mask_BL)
        prepared = prepare(
            rollout,
            token_pass,
            metrics,
            recipe=composition.recipe,
            correction=composition.mismatch,
            reference_BL=policy.reference_log_probs(*reference) if config.objective.kl > 0 else None,
        )
        actuation = control.decide(prepared.signal)
        change = attribution.observe(prepared.entropy)
        advantages_B = composition.estimator(prepared.outcomes)
        rule = composition.recipe.rule
        rows = weigh(prepared, advantages_B, rule, metrics, gain=actuation.gain, seed=step)
        parts = minibatches(rows, prepared.groups_B, config.objective, step, aggregation=composition.aggregation)
        for age, part in enumerate(parts, start=1):
            policy.update(part, composition.objective(actuation, age), metrics)
        means = policy.reduce_metrics(metrics).means()
        record.append(
            {
                "signal": prepared.signal,
                "advantages": advantages_B,
                "weight": rows.given["weight"],
                **{f"actuation/{name}": value for name, value in dataclasses.asdict(actuation).items()},
                "metrics": {**means, **change, **attribution.record(means)},
            }
        )
    return {"steps": record, "control": control.state_dict(), "weights": weights_of(policy)}
