"""What the trainer asks of an inference engine, and how one step's prompts are divided among engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from megatron_rlvr.core import Sample, SamplingParams

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class Engine(Protocol):
    """An inference engine that serves one version of the policy's weights at a time."""

    @property
    def version(self) -> int | None:
        """Version of the weights served; None before the first resync or after one that failed."""
        ...

    def generate(self, prompts: Sequence[str], sampling: SamplingParams) -> list[Sample]:
        """Draw ``sampling.samples_per_prompt`` responses for every prompt, in prompt order.

        ``Sample.group`` is the prompt's position in ``prompts``. The draws are a function of the weights, the prompts
        and ``sampling`` alone, save on SGLang servers that run without deterministic inference.

        Raises:
            RLVRError: If no complete set of weights is served, or a prompt has no tokens.
        """
        ...

    def resync(self, tensors: NamedTensors, version: int) -> None:
        """Replace all weights by ``tensors`` (Hugging Face names, full tensors), then serve ``version``.

        Raises:
            RLVRError: If a tensor is unknown, missing or of another shape; nothing is served until a resync succeeds.
        """
        ...


def generate_share(
    engine: Engine, prompts: Sequence[str], sampling: SamplingParams, *, prompts_per_call: int, rank: int, ranks: int
) -> Iterator[list[Sample]]:
    """This rank's part of one step's samples; together the ranks' parts hold every prompt once.

    The prompts are cut into calls of ``prompts_per_call``; call i belongs to rank ``i % ranks`` and draws with its own
    seed, so the samples do not depend on the number of ranks.

    Args:
        engine: This rank's engine.
        prompts: All prompts of the step.
        sampling: Sampling parameters; the seed is the step's.
        prompts_per_call: Prompts per call of the engine.
        rank: This rank among those that generate.
        ranks: How many generate.

    Yields:
        The samples of one call, ``group`` counted over all prompts of the step.
    """
    for call, start in enumerate(range(0, len(prompts), prompts_per_call)):
        if call % ranks != rank:
            continue
        seeded = replace(sampling, seed=derive_seed(sampling.seed, call))
        samples = engine.generate(prompts[start : start + prompts_per_call], seeded)
        yield [replace(sample, group=sample.group + start) for sample in samples]


def derive_seed(*parts: int) -> int:
    """A seed that depends on all of ``parts`` and their order (63 bits, the same on every machine)."""
    seed = 0x9E3779B97F4A7C15
    for part in parts:
        # splitmix64: neighbouring inputs give unrelated outputs
        seed = (seed ^ (part & (2**64 - 1))) * 0xBF58476D1CE4E5B9 % 2**64
        seed = (seed ^ (seed >> 27)) * 0x94D049BB133111EB % 2**64
        seed ^= seed >> 31
    return seed >> 1
