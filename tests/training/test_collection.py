"""What a step collects: whole groups, refilled and over-provisioned, begun early and never lost in a checkpoint."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.config import Config, DataConfig, PolicyConfig, RolloutConfig, RunConfig
from megatron_rlvr.core import FinishReason, Prompt, RLVRError, Sample, SamplingParams, StepMetrics, Verdict
from megatron_rlvr.data import PromptSampler
from megatron_rlvr.policy import cpu_runtime

cpu_runtime.install()

from megatron_rlvr.training.checkpoint import _collected  # noqa: E402
from megatron_rlvr.training.collection import Collected, Collector  # noqa: E402
from megatron_rlvr.training.engines import FleetRollouts  # noqa: E402

STEPS = 6
RIGHT, WRONG, BROKEN = Verdict.ACCEPTED, Verdict.WRONG_ANSWER, Verdict.INFRA_ERROR


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=f"q{number}", text=f"{number}", kind="math", spec={}) for number in range(count)]


class Rollouts:
    """Draws at once; of ``prompts`` only the last ``wanted`` finish. Every sample says whose it is and what drew it."""

    def __init__(self) -> None:
        self.version = 0
        self.drawn: list[tuple[list[str], SamplingParams]] = []

    def start(self, work: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work())
        return done

    def agree(self, work: Callable[[], Any]) -> Any:
        return work()

    def draw(self, prompts: Sequence[Prompt], sampling: SamplingParams, wanted: int) -> list[Sample]:
        self.drawn.append(([prompt.id for prompt in prompts], sampling))
        return [
            Sample(position, [int(prompt.text) + 1], [7], [-1.0], prompt.text, FinishReason.STOP, self.version)
            for position, prompt in enumerate(prompts)
            if position >= len(prompts) - wanted
            for _ in range(sampling.samples_per_prompt)
        ]


def collector(
    rollouts: Any, *, sampler: PromptSampler | None = None, judge: Callable[..., Any] | None = None, **rollout: Any
) -> Collector:
    settings = RolloutConfig(prompts=4, samples_per_prompt=2, engine="sglang", **rollout)
    config = Config(
        run=RunConfig(dir="r", steps=STEPS),
        data=DataConfig(train="t"),
        policy=PolicyConfig(model="m"),
        rollout=settings,
    )

    def half_right(prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[Verdict]:
        return [RIGHT if row % 2 else WRONG for row in range(len(samples))]

    return Collector(
        config,
        rollouts,
        sampler or PromptSampler(prompts(100), seed=0),
        judge=judge or half_right,
        on_rank_0=lambda work: work(),
        seed=lambda step: 1000 + step,
        pad_id=0,
    )


def prompt_numbers(collected: Collected) -> list[int]:
    """Whose rows they are."""
    assert collected.batch is not None
    return [int(row[0]) - 1 for row in collected.batch.tokens_BL[::2]]


@given(
    kinds=st.lists(st.sampled_from(["mixed", "right", "wrong", "broken", "half broken"]), min_size=40, max_size=40),
    refills=st.integers(0, 3),
)
def test_refills_replace_groups_without_a_contrast_and_lose_no_prompt(kinds: list[str], refills: int) -> None:
    given_verdicts = {
        **{"mixed": [RIGHT, WRONG], "right": [RIGHT, RIGHT], "wrong": [WRONG, WRONG]},
        **{"broken": [BROKEN, BROKEN], "half broken": [RIGHT, BROKEN]},
    }

    def judge(asked: Sequence[Prompt], samples: Sequence[Sample]) -> list[Verdict]:
        return [given_verdicts[kinds[int(sample.text)]][row % 2] for row, sample in enumerate(samples)]

    rollouts, sampler = Rollouts(), PromptSampler(prompts(40), seed=3)
    collected = collector(rollouts, sampler=sampler, judge=judge, refills=refills).take(0, 1.0)
    assert collected.batch is not None
    assert collected.batch.groups_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    drawn = [int(number[1:]) for asked, _ in rollouts.drawn for number in asked]
    assert [f"q{number}" for number in drawn] == [
        prompt.id for prompt in PromptSampler(prompts(40), 3).take(len(drawn))
    ]
    numbers = prompt_numbers(collected)
    mixed = [number for number in drawn if kinds[number] == "mixed"]
    others = [number for number in drawn if kinds[number] != "mixed"]
    assert numbers == ([*mixed, *others][:4] if refills else drawn)
    assert len(rollouts.drawn) <= refills + 1
    if len(mixed) < 4:
        assert len(rollouts.drawn) == refills + 1
    expected = [given_verdicts[kinds[number]] for number in numbers]
    assert collected.batch.rewards_B.tolist() == [float(verdict is RIGHT) for pair in expected for verdict in pair]
    assert collected.batch.valid_B.tolist() == [verdict is not BROKEN for pair in expected for verdict in pair]
    assert collected.metrics.means()["contrast_share"] == pytest.approx(len(mixed) / len(drawn))
    assert collected.metrics.means()["drawn_prompts"] == len(drawn)
    assert len({sampling.seed for _, sampling in rollouts.drawn}) == len(rollouts.drawn)


def test_the_first_draw_of_a_step_has_the_seed_of_the_step() -> None:
    rollouts = Rollouts()
    batches = collector(rollouts, refills=2)
    for step in range(3):
        batches.take(step, 0.7)
    assert [(sampling.seed, sampling.temperature) for _, sampling in rollouts.drawn] == [
        (1000, 0.7),
        (1001, 0.7),
        (1002, 0.7),
    ]


def test_stragglers_come_first_in_the_next_step() -> None:
    rollouts = Rollouts()
    batches = collector(rollouts, over_provision=1.5)
    order = [prompt.id for prompt in PromptSampler(prompts(100), seed=0).take(20)]
    used = [f"q{number}" for step in range(3) for number in prompt_numbers(batches.take(step, 1.0))]
    drawn = [asked for asked, _ in rollouts.drawn]
    assert drawn[0] == order[:6]
    assert drawn[1] == [*order[:2], *order[6:10]]
    assert drawn[2] == [*order[:2], *order[10:14]]  # the fake lets the same two straggle for ever
    assert used == [*order[2:6], *order[6:10], *order[10:14]]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_token_is_older_than_the_bound(staleness: int) -> None:
    rollouts = Rollouts()
    batches = collector(rollouts, max_staleness=staleness)
    ages = []
    for step in range(STEPS):
        rollouts.version = step
        collected = batches.take(step, 1.0)
        assert collected.batch is not None
        ages.append(step - int(collected.batch.versions_BL.max()))
        assert len(rollouts.drawn) == min(step + staleness + 1, STEPS)
    assert ages == [min(step, staleness) for step in range(STEPS)]
    assert [sampling.seed for _, sampling in rollouts.drawn] == [1000 + step for step in range(STEPS)]


@pytest.mark.parametrize("resumed_after", [1, 3, 5])
def test_batches_that_wait_survive_a_resume(resumed_after: int) -> None:
    """With versions 0, 1, 2, … served in turn, the rows of both runs say who made them."""

    def run(batches: Collector, rollouts: Rollouts, steps: range) -> list[Any]:
        taken = []
        for step in steps:
            rollouts.version = step
            collected = batches.take(step, 1.0)
            assert collected.batch is not None
            taken.append((prompt_numbers(collected), collected.batch.versions_BL.tolist(), collected.position))
        return taken

    settings = {"max_staleness": 2, "over_provision": 1.5, "refills": 1}
    whole = run(collector(rollouts := Rollouts(), **settings), rollouts, range(STEPS))
    before = collector(rollouts := Rollouts(), **settings)
    first = run(before, rollouts, range(resumed_after))
    position, finished = before.state_dict()
    assert len(finished) == min(2, STEPS - resumed_after)
    torch.save([asdict(batch) for batch in finished], file := io.BytesIO())
    file.seek(0)
    after = collector(rollouts := Rollouts(), **settings)
    after.load_state_dict(position, [_collected(saved) for saved in torch.load(file, weights_only=True)])
    assert first + run(after, rollouts, range(resumed_after, STEPS)) == whole


class Fleet:
    """Generates a batch when it is told to."""

    def __init__(self) -> None:
        self.may_end = [threading.Event() for _ in range(STEPS)]
        self.began = [threading.Event() for _ in range(STEPS)]
        self.failing = False
        self._call = 0

    def generate(self, texts: Sequence[str], sampling: SamplingParams, wanted: int | None) -> list[Sample]:
        call, self._call = self._call, self._call + 1
        self.began[call].set()
        assert self.may_end[call].wait(10.0)
        if self.failing:
            raise RLVRError("the fleet is gone; mend it")
        return Rollouts().draw([SimpleNamespace(id=text, text=text) for text in texts], sampling, len(texts))  # type: ignore[misc]


def test_the_next_batch_is_drawn_while_this_one_trains() -> None:
    fleet = Fleet()
    rollouts = FleetRollouts(fleet, lambda work: work())  # type: ignore[arg-type]
    batches = collector(rollouts, max_staleness=1)
    fleet.may_end[0].set()
    first = batches.take(0, 1.0)
    assert fleet.began[1].wait(10.0)  # and it goes on through what would now be the update
    position, finished = batches.state_dict()
    assert (position, finished) == (first.position, [])  # what is being drawn is no part of a checkpoint
    fleet.may_end[1].set()
    fleet.may_end[2].set()
    second = batches.take(1, 1.0)
    assert set(prompt_numbers(first)).isdisjoint(prompt_numbers(second))
    rollouts.close()


def test_what_fails_in_the_background_is_raised_by_the_step_that_needs_it() -> None:
    fleet = Fleet()
    rollouts = FleetRollouts(fleet, lambda work: work())  # type: ignore[arg-type]
    batches = collector(rollouts, max_staleness=1)
    fleet.may_end[0].set()
    batches.take(0, 1.0)
    fleet.failing = True
    fleet.may_end[1].set()
    fleet.may_end[2].set()
    with pytest.raises(RLVRError, match="the fleet is gone"):
        batches.take(1, 1.0)
    assert batches.state_dict()[1] == []
    rollouts.close()


def test_the_metrics_are_of_all_that_was_drawn() -> None:
    verdicts = iter([[RIGHT] * 8, [RIGHT, WRONG] * 4])
    collected = collector(Rollouts(), judge=lambda *_: next(verdicts), refills=1).take(0, 1.0)
    means = collected.metrics.means()
    assert means["verdict/accepted"] == 0.75
    assert means["contrast_share"] == 0.5
    assert collected.batch is not None
    assert collected.batch.rewards_B.tolist() == [1, 0] * 4
    assert isinstance(collected.metrics, StepMetrics)
