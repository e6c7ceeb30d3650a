"""Entropy control: a signal (how uncertain the policy is), a controller, an actuator, token rules; recipes of them."""

from __future__ import annotations

from megatron_rlvr.entropy.actuation import Actuation
from megatron_rlvr.entropy.attribution import Attribution
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
from megatron_rlvr.entropy.recipes import RECIPES, Recipe, RunPlan, build_recipe
from megatron_rlvr.entropy.signal import SignalKind, mean_entropy
from megatron_rlvr.entropy.targets import Target
from megatron_rlvr.entropy.tokens import TokenBatch, TokenPlan, TokenRule

__all__ = [
    "RECIPES",
    "Actuation",
    "AdaptiveCoefficient",
    "Attribution",
    "BangBang",
    "Constant",
    "Controller",
    "Cosine",
    "EntropyControl",
    "EntropyGuided",
    "EpochWise",
    "Fallback",
    "Gate",
    "Linear",
    "Multiplicative",
    "ProportionalIntegral",
    "Recipe",
    "RunPlan",
    "SignalKind",
    "StageBased",
    "Target",
    "TokenBatch",
    "TokenPlan",
    "TokenRule",
    "build_recipe",
    "mean_entropy",
]
