"""A policy small enough to try a recipe in seconds: one table of logits, our controllers, token rules and objective.

    python examples/tabular_plant.py par --target 100% --seeds 4
    python examples/tabular_plant.py none bonus --option coefficient=0.003 --updates 8

Logits z[m, t] = shared[t] + own[m, t] for prompt m and position t, Adam, group-normalised advantages, N mini-batches by
prompt. Two tasks: ``random`` rewards a response by chance, so that nothing can be learned and only the update rule
moves the entropy; ``learnable`` rewards a sum modulo 10. On the learnable one, curves against *steps* mostly show how
fast a rule learns: compare at equal accuracy. A plant for controllers, not evidence about language models.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import yaml

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy import RunPlan, build_recipe
from megatron_rlvr.objective import (
    ESTIMATORS,
    BatchStats,
    LossInputs,
    LossSettings,
    Outcomes,
    actuated,
    compose,
    policy_loss,
)


@dataclass(frozen=True)
class Plant:
    """One run: the task, the policy, the updates and the recipe."""

    recipe: str = "none"
    target: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    fallback_after: int = 0
    task: str = "random"
    steps: int = 300
    updates: int = 4
    reuse: int = 1
    optimizer: str = "adam"
    seed: int = 0
    clip_low: float = 0.2
    clip_high: float = 0.2
    negative_weight: float = 1.0
    prompts: int = 64
    length: int = 6
    vocab: int = 50
    batch: int = 32
    group: int = 16


@dataclass
class Trace:
    """What a run did, one number per step.

    Attributes:
        entropy: Exact mean entropy over all contexts before the step, nats; one more at the end.
        value: The controller's value in the step.
        accuracy: Share of rewarded responses.
        saturated_low: Steps at the lower bound.
        saturated_high: Steps at the upper bound.
        alarms: Steps with an alarm.
    """

    entropy: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    saturated_low: int = 0
    saturated_high: int = 0
    alarms: int = 0


def run(plant: Plant) -> Trace:
    """Train one plant; the same seed gives the same start and the same samples as long as the policies agree."""
    torch.manual_seed(plant.seed)
    torch.set_num_threads(1)  # tensors this small only wait for other threads
    shared = (2.5 * torch.randn(plant.length, plant.vocab)).requires_grad_()
    own = torch.randn(plant.prompts, plant.length, plant.vocab).requires_grad_()
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam([shared, own], lr=0.03)
        if plant.optimizer == "adam"
        else torch.optim.SGD([shared, own], lr=20.0)
    )
    recipe = build_recipe(
        plant.recipe,
        RunPlan(total_steps=plant.steps, steps_per_epoch=plant.prompts // plant.batch),
        target=plant.target,
        options=plant.options,
        fallback_after=plant.fallback_after,
    )
    if recipe.nucleus or plant.recipe == "temperature_pi":
        raise RLVRError(f"recipe {plant.recipe} needs a nucleus or a sampling temperature, which this plant lacks")
    trace = Trace()
    for step in range(plant.steps):
        with torch.no_grad():
            trace.entropy.append(float(_entropy(_logp(shared + own)).mean()))
        prompts_B = torch.randperm(plant.prompts)[: plant.batch]
        with torch.no_grad():
            logp_BLV = _logp(shared + own[prompts_B]).repeat_interleave(plant.group, dim=0)
        tokens_BL = torch.multinomial(logp_BLV.exp().flatten(0, 1), 1).view(logp_BLV.shape[:2])
        rows_B = prompts_B.repeat_interleave(plant.group)
        rewards_B = _rewards(plant, tokens_BL, rows_B)
        mask_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
        stats = BatchStats(mask_BL, logp_BLV.gather(-1, tokens_BL[..., None]).squeeze(-1), _entropy(logp_BLV))
        groups_B = torch.arange(plant.batch).repeat_interleave(plant.group)
        outcomes = Outcomes(rewards_B, groups_B, torch.ones_like(groups_B, dtype=torch.bool))
        advantages_B = ESTIMATORS[recipe.advantages or "grpo"](outcomes, **recipe.advantage_options)
        actuation = recipe.control.decide(float(stats.entropy_BL.double().mean()))
        trace.value.append(recipe.control.value)
        given = compose(stats, advantages_B, recipe.rule, gain=actuation.gain, seed=step)
        settings = LossSettings(
            clip_low=plant.clip_low,
            clip_high=plant.clip_high,
            negative_weight=plant.negative_weight,
            **recipe.loss,
        )
        settings = actuated(settings, actuation)
        for _ in range(plant.reuse):
            for rows in torch.randperm(plant.batch).chunk(plant.updates):
                chosen = (groups_B[:, None] == rows).any(1)
                logp = _logp(shared + own[rows_B[chosen]])
                inputs = LossInputs(
                    logp.gather(-1, tokens_BL[chosen][..., None]).squeeze(-1),
                    entropy=_entropy(logp),
                    mask=mask_BL[chosen],
                    **{name: value_BL[chosen] for name, value_BL in given.items()},
                )
                outputs = policy_loss(inputs, settings)
                optimizer.zero_grad()
                torch.autograd.backward(outputs.loss_sum / outputs.count)
                optimizer.step()
        trace.accuracy.append(float(rewards_B.mean()))
        trace.alarms += recipe.control.alarm is not None
    trace.saturated_low, trace.saturated_high = recipe.control.saturated_low, recipe.control.saturated_high
    with torch.no_grad():
        trace.entropy.append(float(_entropy(_logp(shared + own)).mean()))
    return trace


def _logp(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1)


def _entropy(logp: torch.Tensor) -> torch.Tensor:
    return -(logp.exp() * logp).sum(-1)


def _rewards(plant: Plant, tokens_BL: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor:
    if plant.task == "random":
        return (torch.rand(len(rows_B)) < 0.3).float()
    return (tokens_BL.sum(1) % 10 == rows_B % 10).float()


def over_seeds(plant: Plant, seeds: Sequence[int]) -> list[Trace]:
    """The same run from several starts."""
    return [run(replace(plant, seed=seed)) for seed in seeds]


def main() -> None:
    """One line per recipe and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--target", default="")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--seeds", type=int, default=1)
    for name in ("steps", "updates", "reuse"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plant, name))
    parser.add_argument("--task", choices=("random", "learnable"), default="random")
    arguments = parser.parse_args()
    options = {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in arguments.option)}
    for name in arguments.recipes:
        for seed in range(arguments.seeds):
            plant = Plant(
                name,
                arguments.target,
                options,
                task=arguments.task,
                steps=arguments.steps,
                updates=arguments.updates,
                reuse=arguments.reuse,
                seed=seed,
            )
            trace = run(plant)
            print(
                f"{name:18} seed {seed}: H {trace.entropy[0]:.3f} → {trace.entropy[-1]:.3f}, value at the end "
                f"{trace.value[-1]:.4f}, at a bound {trace.saturated_low} + {trace.saturated_high} of {plant.steps} "
                f"steps, reward {trace.accuracy[0]:.2f} → {trace.accuracy[-1]:.2f}"
            )


if __name__ == "__main__":
    main()
