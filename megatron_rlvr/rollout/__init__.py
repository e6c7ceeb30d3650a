"""Rollout: the engine protocol and the engines that implement it."""

from megatron_rlvr.rollout.embedded import EmbeddedEngine, load_tokenizer, pad_id
from megatron_rlvr.rollout.engine import Engine, NamedTensors, derive_seed, generate_share

__all__ = ["EmbeddedEngine", "Engine", "NamedTensors", "derive_seed", "generate_share", "load_tokenizer", "pad_id"]
