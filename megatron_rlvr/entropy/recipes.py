"""Recipes: signal, controller, actuator, token rule and what the objective has to bring, by one name.

Every default is its paper's where the paper or its code states one; docs/entropy.md has the table with formulas,
sources and failures. ``par_pi`` and ``temperature_pi`` are ours.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy import token_masks, token_weights
from megatron_rlvr.entropy.control import EntropyControl, Fallback
from megatron_rlvr.entropy.controllers import Constant, Controller, Cosine, EpochWise, Linear, StageBased
from megatron_rlvr.entropy.feedback import (
    AdaptiveCoefficient,
    BangBang,
    EntropyGuided,
    Gate,
    Multiplicative,
    ProportionalIntegral,
)
from megatron_rlvr.entropy.signal import SignalKind
from megatron_rlvr.entropy.targets import Target
from megatron_rlvr.entropy.token_masks import Uniform
from megatron_rlvr.entropy.tokens import TokenBatch, TokenRule

Options = Mapping[str, Any]
NUCLEUS = 0.8  # top-p of the nucleus signal; SIREN's


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a recipe may want to know of the run.

    Attributes:
        total_steps: Rollout steps.
        steps_per_epoch: Rollout steps in one pass over the prompts.
        temperature: Configured sampling temperature.
    """

    total_steps: int
    steps_per_epoch: int
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a controller is made of: the recipe's options, its target and the run's plan."""

    options: Options
    target: Target
    plan: RunPlan

    def parse(self, name: str) -> Target:
        """The target that an option spells."""
        return Target.parse(str(self.options[name]), self.plan.total_steps)


@dataclass(frozen=True, slots=True)
class _Spec:
    """What a name stands for.

    Attributes:
        controller: Makes the controller.
        actuator: What its value does, a key of ``ACTUATORS``.
        options: Default of every option.
        target: Default target; empty for an open loop.
        immediate: Whether H_k moves step k rather than step k + 1.
        rule: Makes the token rule.
        advantages: Estimator that its advantages have to come from; empty for any.
        advantage_options: Makes that estimator's options.
        loss: Makes the fields of ``LossSettings`` that it brings.
        signal: The signal that the recipe is about.
    """

    controller: Callable[[_Inputs], Controller]
    actuator: str
    options: Options = field(default_factory=dict)
    target: str = ""
    immediate: bool = False
    rule: Callable[[Options], TokenRule] = lambda options: Uniform()
    advantages: str = ""
    advantage_options: Callable[[Options], dict[str, Any]] = lambda options: {}
    loss: Callable[[Options], dict[str, Any]] = lambda options: {}
    signal: SignalKind = "rollout"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe ready to run.

    Attributes:
        name: Its name.
        control: Decides every step's actuation; stateful.
        rule: Weights the tokens of a rollout batch, given the actuation's ``gain``.
        advantages: Estimator that its advantages have to come from; empty for any.
        advantage_options: Options of that estimator.
        loss: Fields of ``LossSettings`` that it brings.
        nucleus: Top-p of the nucleus entropy that the signal or the loss needs; None for neither.
        nucleus_share: Share of the tokens, those where it is highest, over which the nucleus signal is the mean.
        trains_nucleus: Whether the bonus acts on the nucleus entropy.
    """

    name: str
    control: EntropyControl
    rule: TokenRule
    advantages: str
    advantage_options: dict[str, Any]
    loss: dict[str, Any]
    nucleus: float | None = None
    nucleus_share: float = 1.0
    trains_nucleus: bool = False


def _fixed(value: float) -> Callable[[_Inputs], Controller]:
    return lambda inputs: Constant(value)


def _option(name: str) -> Callable[[_Inputs], Controller]:
    return lambda inputs: Constant(inputs.options[name])


def _pi(inputs: _Inputs, *, direction: int, bias: float = 0.0, anti_windup: bool = True) -> Controller:
    options = inputs.options
    return ProportionalIntegral(
        inputs.target,
        kp=options["kp"],
        ki=options["ki"],
        low=options["low"],
        high=options["high"],
        bias=bias,
        direction=direction,
        deadband=options.get("deadband", 0.0),
        anti_windup=anti_windup,
    )


def _entropy_guided(inputs: _Inputs) -> Controller:
    options = inputs.options
    return EntropyGuided(
        target=inputs.target,
        step_size=options["step"],
        initial=options["initial"],
        low=options["low"],
        high=options["high"],
    )


def _epoch_wise(inputs: _Inputs) -> Controller:
    steps = max(inputs.plan.steps_per_epoch, 1)
    return EpochWise(epochs=math.ceil(inputs.plan.total_steps / steps), steps_per_epoch=inputs.plan.steps_per_epoch)


def _ramp(inputs: _Inputs) -> Controller:
    options = inputs.options
    shapes = {"linear": Linear, "cosine": Cosine}
    if options["shape"] not in shapes:
        raise RLVRError(f"entropy.options.shape is {options['shape']!r}; it is linear or cosine")
    return shapes[options["shape"]](options["start"], options["end"], options["steps"] or inputs.plan.total_steps)


def _temperature(inputs: _Inputs) -> Controller:
    low, high, temperature = inputs.options["low"], inputs.options["high"], inputs.plan.temperature
    if not low <= temperature <= high:
        raise RLVRError(
            f"rollout.temperature is {temperature} but temperature_pi moves within [{low}, {high}]; change it, or "
            "entropy.options.low and high"
        )
    return _pi(inputs, direction=-1, bias=temperature)


def _adaptive(inputs: _Inputs) -> Controller:
    return AdaptiveCoefficient(inputs.target, step_size=inputs.options["step"], high=inputs.options["high"])


_PI_OPTIONS = {"kp": 2.0, "ki": 0.1, "low": 0.0, "high": 1.0, "deadband": 0.0}


def _rule(rule: Callable[..., TokenRule], options: Options) -> _Spec:
    """An open loop that only weights tokens; the rule's fields are the options."""
    return _Spec(_fixed(1.0), "positive_weight", options, rule=lambda chosen: rule(**chosen))


_SPECS: dict[str, _Spec] = {
    "none": _Spec(_fixed(1.0), "positive_weight"),
    "par": _Spec(
        _entropy_guided, "positive_weight", {"step": 0.05, "initial": 0.0, "low": 0.0, "high": 1.0}, target="0.2"
    ),
    "par_pi": _Spec(lambda inputs: _pi(inputs, direction=1, bias=1.0), "positive_weight", _PI_OPTIONS, target="0.2"),
    "par_stage": _Spec(lambda inputs: StageBased(inputs.plan.total_steps), "positive_weight"),
    "par_epoch": _Spec(_epoch_wise, "positive_weight"),
    "schedule": _Spec(
        _ramp,
        "positive_weight",
        {"actuator": "positive_weight", "start": 0.0, "end": 1.0, "shape": "linear", "steps": 0},
    ),
    "fixed": _Spec(_option("positive_weight"), "positive_weight", {"positive_weight": 0.5}),
    "w_reinforce": _Spec(_option("positive_weight"), "positive_weight", {"positive_weight": 0.1}, advantages="outcome"),
    "nsr": _Spec(_fixed(0.0), "positive_weight", advantages="outcome"),
    "psr": _Spec(_fixed(0.0), "negative_weight", advantages="outcome"),
    "ada_ent_reg": _Spec(_adaptive, "bonus", {"step": 0.005, "high": 1.0}, target="0.2", immediate=True),
    "bonus": _Spec(_option("coefficient"), "bonus", {"coefficient": 0.001}),
    "siren": _Spec(
        # loss c (H - anchor)^2: its gradient is that of the bonus -2c (H - anchor)
        lambda inputs: ProportionalIntegral(
            inputs.target, kp=2 * inputs.options["coefficient"], ki=0.0, low=-1.0, high=1.0, direction=-1
        ),
        "bonus",
        {"coefficient": 0.005, "share": 0.2},
        target="100%",
        immediate=True,
        rule=lambda options: token_masks.NucleusBonus(share=options["share"]),
        signal="nucleus",
    ),
    "entropic": _Spec(
        lambda inputs: _pi(inputs, direction=1, anti_windup=False),
        "gain",
        {"kp": 1.0, "ki": 0.01, "low": -1.0, "high": 1.0, "threshold": 0.95},
        target="0.1",
        immediate=True,
        rule=lambda options: token_weights.ConfidentSigns(threshold=options["threshold"]),
    ),
    "entrocraft": _Spec(
        lambda inputs: BangBang(inputs.parse("lower"), inputs.parse("upper")),
        "sign_balance",
        {"lower": "0.6 -> 0.4", "upper": "0.7 -> 0.5"},
        immediate=True,
    ),
    "stare": _Spec(
        lambda inputs: Gate(inputs.target, on=inputs.options["gain"]),
        "gain",
        {"gain": 0.1, "share": 0.1, "both_signs": False},
        target="0.3",
        immediate=True,
        rule=lambda options: token_weights.Surprisal(share=options["share"], both_signs=options["both_signs"]),
    ),
    "temperature_pi": _Spec(
        _temperature,
        "temperature",
        {"kp": 1.0, "ki": 0.05, "low": 0.5, "high": 1.5},
        target="100%",
    ),
    "clip_higher": _Spec(_option("clip_high"), "clip_high", {"clip_high": 0.28}),
    "gppo": _Spec(
        _fixed(1.0),
        "positive_weight",
        {"low": 0.5, "high": 1.0},
        loss=lambda options: {"surrogate": "gppo", "gppo_low": options["low"], "gppo_high": options["high"]},
    ),
    "clip_cov": _rule(token_masks.ClipCov, {"share": 2e-4, "low": 1.0, "high": 5.0}),
    "kl_cov": _rule(token_masks.KlCov, {"share": 2e-4, "coefficient": 1.0}),
    "rand_pos_clip": _rule(token_masks.RandomPositives, {"share": 2e-4}),
    "top_entropy": _rule(token_masks.TopEntropy, {"share": 0.2}),
    "entropy_advantage": _rule(token_weights.EntropyAdvantage, {"alpha": 0.4, "kappa": 2.0}),
    "asym_grpo": _Spec(
        _fixed(1.0),
        "positive_weight",
        {"b_plus": 0.5, "b_minus": 0.5},
        advantages="asym_grpo",
        advantage_options=dict,
    ),
    "a3po": _Spec(
        lambda inputs: Linear(inputs.options["start"], 1.0, inputs.options["steps"] + 1),
        "gain",
        {"start": 2.0, "steps": 200, "share": 0.2},
        rule=lambda options: token_weights.LowProbPositives(share=options["share"]),
    ),
    "steer": _rule(token_weights.Steer, {"form": "linear", "weight_min": 0.8, "weight_max": 1.2}),
    "repo_r": _Spec(
        lambda inputs: Multiplicative(
            inputs.target,
            initial=inputs.options["initial"],
            low=inputs.options["low"],
            high=inputs.options["high"],
        ),
        "gain",
        {"initial": 0.01, "low": 1e-4, "high": 1.0},
        target="100%",
        immediate=True,
        rule=lambda options: token_weights.LogProbAdvantage(),
    ),
}

RECIPES = tuple(_SPECS)


def build_recipe(
    name: str,
    plan: RunPlan,
    *,
    target: str = "",
    options: Options | None = None,
    signal: SignalKind | None = None,
    ema: float = 0.0,
    alarm_after: int = 20,
    fallback_after: int = 0,
    fallback_high: float = 0.005,
) -> Recipe:
    """The recipe that ``name`` stands for.

    Args:
        name: One of ``RECIPES``.
        plan: Length and temperature of the run.
        target: Overrides the recipe's target; see `Target.parse`.
        options: Override the recipe's options.
        signal: Overrides the entropy that steers.
        ema: Share of the past in the smoothed signal.
        alarm_after: Steps at a bound, entropy on the wrong side, until ``control.alarm`` says so.
        fallback_after: Such steps until an adaptive entropy bonus joins in; 0 for never.
        fallback_high: Its largest coefficient; it moves by a fiftieth of that, which with 0.005 is Skywork's release.

    Raises:
        RLVRError: If the name or an option is unknown, or a value does not fit.
    """
    if name not in _SPECS:
        nearest = difflib.get_close_matches(name, _SPECS, n=1, cutoff=0.0)[0]
        raise RLVRError(f"entropy.recipe {name!r} is unknown; use {nearest!r} or another of {', '.join(_SPECS)}")
    spec = _SPECS[name]
    if name == "none":
        target = ""  # by this name alone a run becomes its own baseline
    if target and not spec.target:
        raise RLVRError(f"entropy.target is {target!r} but recipe {name} has no target; leave it empty or use par")
    goal = Target.parse(target or spec.target or "0", plan.total_steps)
    chosen = _merged(name, spec.options, options or {})
    kind = signal or spec.signal
    if spec.signal == "nucleus" and kind != "nucleus":
        raise RLVRError(f"entropy.signal is {kind} but {name} steers the nucleus entropy; leave it empty")
    fallback = None
    if fallback_after:
        if not spec.target or spec.actuator == "bonus":
            raise RLVRError(
                f"entropy.fallback_after is {fallback_after} but recipe {name} has no target to fall behind, or acts "
                "on the entropy bonus itself; set it to 0"
            )
        goal_again = Target.parse(target or spec.target, plan.total_steps)  # a target has a state of its own
        rescue = AdaptiveCoefficient(goal_again, step_size=fallback_high / 50, high=fallback_high)
        fallback = Fallback(rescue, "bonus", after=fallback_after)
    control = EntropyControl(
        spec.controller(_Inputs(chosen, goal, plan)),
        chosen.get("actuator", spec.actuator),
        immediate=spec.immediate,
        signal=kind,
        ema=ema,
        fallback=fallback,
        alarm_after=alarm_after,
    )
    rule = spec.rule(chosen)
    _try(rule, *(control.controller.bounds or (0.0,) if spec.actuator == "gain" else (0.0,)))
    return Recipe(
        name,
        control,
        rule,
        spec.advantages,
        spec.advantage_options(chosen),
        spec.loss(chosen),
        NUCLEUS if kind == "nucleus" else None,
        nucleus_share=chosen["share"] if spec.signal == "nucleus" else 1.0,
        trains_nucleus=spec.signal == "nucleus",
    )


def _try(rule: TokenRule, *gains: float) -> None:
    """Let the rule refuse its options and gains now rather than in the first step."""
    numbers = torch.tensor([1.0, -1.0])
    batch = TokenBatch(-numbers.abs(), numbers.abs(), numbers, torch.arange(2), torch.arange(2), numbers.abs())
    for gain in gains:
        rule(batch, gain)


def _merged(name: str, defaults: Options, given: Options) -> dict[str, Any]:
    """The recipe's options with ``given`` over their defaults, of the same types; whole numbers are numbers."""
    for key, value in given.items():
        if key not in defaults:
            known = f"its options are {', '.join(defaults)}" if defaults else "it has none"
            raise RLVRError(f"entropy.options.{key} is no option of recipe {name}; {known}")
        wanted = type(defaults[key])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise RLVRError(f"entropy.options.{key} is {value!r}; it takes something like {defaults[key]!r}")
    return {**defaults, **given}
