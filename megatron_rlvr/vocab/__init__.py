"""Per-token statistics over a vocabulary-sharded head: log-probability and entropy, exact and differentiable."""

from __future__ import annotations

from megatron_rlvr.vocab.logits import token_stats
from megatron_rlvr.vocab.state import TokenStats

__all__ = ["TokenStats", "token_stats"]
