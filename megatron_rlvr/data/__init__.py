"""Prompt sources, sampling order and the position a run resumes from."""

from __future__ import annotations

from megatron_rlvr.data.sampler import PromptSampler
from megatron_rlvr.data.sources import open_prompts

__all__ = ["PromptSampler", "open_prompts"]
