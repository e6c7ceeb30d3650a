"""Recipes: controllers by the name that a configuration uses."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy.controllers import Constant, Controller, EntropyGuided, EpochWise, StageBased


def build_controller(
    recipe: str, *, target: float, step_size: float, initial: float, total_steps: int, steps_per_epoch: int
) -> Controller:
    """The controller of the positive-advantage weight that ``recipe`` names.

    Args:
        recipe: ``none`` (weight 1 throughout, plain GRPO), ``par`` (entropy-guided), ``par_stage`` or ``par_epoch``.
        target: Entropy in nats that ``par`` steers to.
        step_size: How far ``par`` moves in one step.
        initial: Where ``par`` starts.
        total_steps: Planned rollout steps of the run, for ``par_stage`` and ``par_epoch``.
        steps_per_epoch: Rollout steps in one pass over the prompts, for ``par_epoch``.

    Raises:
        RLVRError: If the recipe is unknown or a value that it uses does not fit.
    """
    recipes: dict[str, Callable[[], Controller]] = {
        "none": lambda: Constant(1.0),
        "par": lambda: EntropyGuided(target=target, step_size=step_size, initial=initial),
        "par_stage": lambda: StageBased(total_steps),
        "par_epoch": lambda: EpochWise(
            epochs=math.ceil(total_steps / max(steps_per_epoch, 1)), steps_per_epoch=steps_per_epoch
        ),
    }
    if recipe not in recipes:
        nearest = difflib.get_close_matches(recipe, recipes, n=1, cutoff=0.0)[0]
        raise RLVRError(f"recipe {recipe!r} is unknown; use {nearest!r} or another of {', '.join(recipes)}")
    return recipes[recipe]()
