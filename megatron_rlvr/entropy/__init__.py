"""Entropy control: a signal (how uncertain the rollout policy is), a controller, and recipes that name them."""

from __future__ import annotations

from megatron_rlvr.entropy.controllers import Constant, Controller, EntropyGuided, EpochWise, StageBased
from megatron_rlvr.entropy.recipes import build_controller
from megatron_rlvr.entropy.signal import mean_entropy

__all__ = [
    "Constant",
    "Controller",
    "EntropyGuided",
    "EpochWise",
    "StageBased",
    "build_controller",
    "mean_entropy",
]
