"""What a configuration composes: recipe, advantages, mismatch correction and loss, and how a step uses them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch

from megatron_rlvr.config import Config
from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy import Actuation, Recipe, RunPlan, SignalKind, build_recipe
from megatron_rlvr.entropy.attribution import CAUSES
from megatron_rlvr.entropy.token_masks import KlCov
from megatron_rlvr.entropy.token_weights import EntropyAdvantage, LogProbAdvantage, LowProbPositives
from megatron_rlvr.objective import (
    BINARY,
    ESTIMATORS,
    MISMATCHES,
    LossInputs,
    LossOutputs,
    LossSettings,
    MismatchSettings,
    Objective,
    Outcomes,
    actuated,
    check_composition,
    policy_loss,
    whiten,
)

_SHAPES_ADVANTAGES = (EntropyAdvantage, LogProbAdvantage, LowProbPositives)


@dataclass(frozen=True, slots=True)
class Composition:
    """The parts of one run's objective.

    Attributes:
        recipe: Signal, controller, actuator and token rule; the only part with a state.
        estimator: From outcomes to one advantage per response, whitened if the run asks for that.
        mismatch: Correction for the engine's log-probs, if any.
        loss: The loss before a step's actuation.
        aggregation: How a mini-batch is averaged, with the length that ``constant`` divides by.
    """

    recipe: Recipe
    estimator: Callable[[Outcomes], torch.Tensor]
    mismatch: MismatchSettings | None
    loss: LossSettings
    aggregation: tuple[str, float | None]

    def objective(self, actuation: Actuation, age: int) -> Objective:
        """The objective of the step's ``age``-th update, counted from 1, under the step's actuation."""
        settings = actuated(self.loss, actuation)
        trains_nucleus = self.recipe.trains_nucleus and settings.bonus != 0.0
        return Objective(
            partial(_aged_loss, settings=settings, age=age),
            separable=settings.separable,
            slope=True,
            nucleus=self.recipe.nucleus if trains_nucleus else None,
        )


def _aged_loss(inputs: LossInputs, *, settings: LossSettings, age: int) -> LossOutputs:
    outputs = policy_loss(inputs, settings)
    drives = [outputs.metrics[f"entropy_drive/{cause}"] for cause in CAUSES]
    outputs.metrics[f"entropy_drive/age_{age}"] = (torch.stack([total for total, _ in drives]).sum(), outputs.count)
    return outputs


def compose_run(config: Config, prompts: int) -> Composition:
    """Everything that a run over ``prompts`` training prompts composes.

    Raises:
        RLVRError: If a part is unknown, an option does not fit, or two parts contradict each other.
    """
    objective, entropy = config.objective, config.entropy
    plan = RunPlan(config.run.steps, max(1, round(prompts / config.rollout.prompts)), config.rollout.temperature)
    recipe = build_recipe(
        entropy.recipe,
        plan,
        target=entropy.target,
        options=entropy.options,
        signal=cast(SignalKind, entropy.signal) if entropy.signal else None,
        ema=entropy.ema,
        alarm_after=entropy.alarm_after,
        fallback_after=entropy.fallback_after,
        fallback_high=entropy.fallback_high,
    )
    name = _agree("objective.advantages", objective.advantages, recipe.advantages, recipe.name) or "grpo"
    if config.rollout.overlong == "penalize" and name in BINARY:
        raise RLVRError(
            f"rollout.overlong=penalize gives rewards other than 0 and 1, but the {name} advantages take only "
            "right and wrong; set it to drop or keep, or change objective.advantages"
        )
    estimator = partial(ESTIMATORS[name], **_advantage_options(name, objective.advantage_options, recipe))
    settings = _loss_settings(config, recipe)
    check_composition(
        settings,
        estimator=name,
        whiten=objective.whiten,
        token_advantages=isinstance(recipe.rule, _SHAPES_ADVANTAGES),
        penalty=isinstance(recipe.rule, KlCov),
        updates=objective.minibatches * objective.epochs,
    )
    if config.policy.context_parallel > 1 and not settings.separable:
        raise RLVRError(
            f"surrogate {settings.surrogate} with opsm {settings.opsm} needs each sequence whole, but "
            f"policy.context_parallel={config.policy.context_parallel} cuts them; set it to 1, or take ppo without opsm"
        )
    constant = float(config.rollout.max_new_tokens) if objective.aggregation == "constant" else None
    return Composition(
        recipe=recipe,
        estimator=partial(_whitened, estimator) if objective.whiten else estimator,
        mismatch=_mismatch(objective.mismatch, objective.mismatch_options),
        loss=settings,
        aggregation=(objective.aggregation, constant),
    )


def _whitened(estimator: Callable[[Outcomes], torch.Tensor], outcomes: Outcomes) -> torch.Tensor:
    lengths_B = outcomes.need("lengths_B", "whitened")
    return whiten(estimator(outcomes), torch.where(outcomes.valid_B, lengths_B, 0))


def _agree(key: str, asked: str, needed: str, recipe: str) -> str:
    """What the run asks for or the recipe needs."""
    if asked and needed and asked != needed:
        raise RLVRError(f"{key} is {asked} but recipe {recipe} needs {needed}; leave {key} empty or change the recipe")
    return asked or needed


def _advantage_options(name: str, given: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    parameters = inspect.signature(ESTIMATORS[name]).parameters.values()
    known = {entry.name: entry.default for entry in parameters if entry.kind is inspect.Parameter.KEYWORD_ONLY}
    _check_known("objective.advantage_options", given, known)
    options = {**recipe.advantage_options, **given}
    for option, default in known.items():
        if default is inspect.Parameter.empty and option not in options:
            raise RLVRError(f"advantages {name} need objective.advantage_options.{option}; set it, 8 for example")
    return options


def _mismatch(name: str, options: Mapping[str, Any]) -> MismatchSettings | None:
    if name == "none":
        _check_known("objective.mismatch_options", options, ())
        return None
    _check_known("objective.mismatch_options", options, [entry.name for entry in dataclasses.fields(MismatchSettings)])
    return replace(MISMATCHES[name], **options)


def _loss_settings(config: Config, recipe: Recipe) -> LossSettings:
    objective = config.objective
    surrogate = _agree("objective.surrogate", objective.surrogate, recipe.loss.get("surrogate", ""), recipe.name)
    ours = {"surrogate", "clip_low", "clip_high", "kl", "kl_estimator", *recipe.loss}
    _check_known(
        "objective.surrogate_options",
        objective.surrogate_options,
        [entry.name for entry in dataclasses.fields(LossSettings) if entry.name not in ours],
    )
    return LossSettings(
        **recipe.loss | objective.surrogate_options | {"surrogate": surrogate or "ppo"},
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        kl=objective.kl,
        kl_estimator=objective.kl_estimator,
    )


def _check_known(key: str, given: Iterable[str], known: Iterable[str]) -> None:
    for option in given:
        if option not in known:
            names = f"known here: {', '.join(known)}" if known else "there are none here"
            raise RLVRError(f"{key}.{option} is no option; {names}")
