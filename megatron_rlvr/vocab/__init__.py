"""Per-token statistics over a vocabulary-sharded head: log-probability and entropy, exact and differentiable."""

from __future__ import annotations

from megatron_rlvr.vocab.linear import linear_token_stats
from megatron_rlvr.vocab.logits import token_stats
from megatron_rlvr.vocab.state import TokenExtras, TokenStats
from megatron_rlvr.vocab.sweep import SweepOutput, linear_policy_loss

__all__ = ["SweepOutput", "TokenExtras", "TokenStats", "linear_policy_loss", "linear_token_stats", "token_stats"]
