"""From rewards to a loss: group advantages and the clipped, sign-weighted surrogate. Pure functions of tensors."""

from __future__ import annotations

from megatron_rlvr.objective.advantages import grpo_advantages
from megatron_rlvr.objective.loss import LossInputs, LossOutputs, Metrics, policy_loss

__all__ = ["LossInputs", "LossOutputs", "Metrics", "grpo_advantages", "policy_loss"]
