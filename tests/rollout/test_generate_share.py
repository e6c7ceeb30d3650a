"""One step's prompts divided among engines, and the seeds that make the division invisible."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.core import FinishReason, Sample, SamplingParams
from megatron_rlvr.rollout import NamedTensors, derive_seed, generate_share

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=4, samples_per_prompt=2, seed=99)


class EchoEngine:
    """Answers with the prompt and the seed."""

    version = 3

    def generate(self, prompts: Sequence[str], sampling: SamplingParams) -> list[Sample]:
        return [
            Sample(
                group=group,
                prompt_ids=[group],
                response_ids=[copy],
                logprobs=[0.0],
                text=f"{prompt} {sampling.seed}",
                finish_reason=FinishReason.STOP,
                weight_version=self.version,
            )
            for group, prompt in enumerate(prompts)
            for copy in range(sampling.samples_per_prompt)
        ]

    def resync(self, tensors: NamedTensors, version: int) -> None:
        raise NotImplementedError


def shares(prompts: list[str], per_call: int, ranks: int) -> list[list[Sample]]:
    """Every call of every rank."""
    return [
        call
        for rank in range(ranks)
        for call in generate_share(EchoEngine(), prompts, SAMPLING, prompts_per_call=per_call, rank=rank, ranks=ranks)
    ]


@given(count=st.integers(0, 20), per_call=st.integers(1, 6), ranks=st.integers(1, 4))
def test_every_prompt_once_and_the_same_samples_for_any_number_of_ranks(count: int, per_call: int, ranks: int) -> None:
    prompts = [f"p{index}" for index in range(count)]
    samples = [sample for call in shares(prompts, per_call, ranks) for sample in call]
    assert sorted(sample.group for sample in samples) == sorted([*range(count), *range(count)])
    assert all(sample.text.startswith(f"p{sample.group} ") for sample in samples)
    alone = [sample for call in shares(prompts, per_call, 1) for sample in call]
    assert sorted(samples, key=lambda sample: sample.group) == alone


@given(count=st.integers(1, 20), per_call=st.integers(1, 6), ranks=st.integers(1, 4))
def test_calls_are_small_evenly_dealt_and_seeded_apart(count: int, per_call: int, ranks: int) -> None:
    prompts = [f"p{index}" for index in range(count)]
    calls = shares(prompts, per_call, ranks)
    assert len(calls) == -(-count // per_call)
    assert all(len(call) <= per_call * SAMPLING.samples_per_prompt for call in calls)
    assert len({call[0].text.split()[1] for call in calls}) == len(calls)
    loads = [
        len(list(generate_share(EchoEngine(), prompts, SAMPLING, prompts_per_call=per_call, rank=rank, ranks=ranks)))
        for rank in range(ranks)
    ]
    assert max(loads) - min(loads) <= 1


def test_derived_seeds_are_distinct_over_a_grid() -> None:
    pairs = {derive_seed(a, b) for a, b in itertools.product(range(300), range(300))}
    singles = {derive_seed(a) for a in range(300)}
    triples = {derive_seed(0, stream, step) for stream, step in itertools.product(range(3), range(5000))}
    assert len(pairs | singles | triples) == 300 * 300 + 300 + 3 * 5000
    assert all(0 <= seed < 2**63 for seed in pairs)


def test_derived_seeds_look_random_in_every_bit() -> None:
    seeds = [derive_seed(7, step) for step in range(4000)]
    for bit in range(63):
        assert 1800 < sum(seed >> bit & 1 for seed in seeds) < 2200


def test_derived_seeds_never_change() -> None:
    """A resumed run, another machine and another version have to draw the same samples."""
    assert derive_seed(0) == 7795324965117060851
    assert derive_seed(1, 2, 3) == 6087047714123848686
    assert derive_seed(2**64 + 5, -1) == derive_seed(5, 2**64 - 1) == 4390485335192972593
