"""A step's judged samples: drawn, verified, refilled, and begun up to `rollout.max_staleness` steps early."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

from megatron_rlvr.config import Config
from megatron_rlvr.core import Prompt, RolloutBatch, Sample, SamplingParams, StepMetrics, Verdict
from megatron_rlvr.data import PromptSampler
from megatron_rlvr.rollout import derive_seed
from megatron_rlvr.training.engines import Rollouts
from megatron_rlvr.training.phases import record_samples

Group = list[tuple[Sample, Verdict]]


@dataclass(frozen=True, slots=True)
class Collected:
    """One step's rows and how they came about.

    Attributes:
        batch: The verified rows; None on ranks that did not judge them.
        temperature: What they were drawn at.
        position: State of the prompt sampler after the last of their prompts.
        epoch: Epoch of that prompt.
        metrics: Statistics of all samples drawn, those that dynamic sampling dropped included.
        seconds: How long drawing and judging took.
    """

    batch: RolloutBatch | None
    temperature: float
    position: dict[str, Any]
    epoch: int
    metrics: StepMetrics
    seconds: dict[str, float]


@dataclass(slots=True)
class _Draft:
    """What one step has collected so far; without groups on a rank that does not judge."""

    metrics: StepMetrics = field(default_factory=StepMetrics)
    seconds: dict[str, float] = field(default_factory=lambda: {"rollout": 0.0, "verify": 0.0})
    kept: list[Group] = field(default_factory=list)
    spare: list[Group] = field(default_factory=list)
    drawn: int = 0


class Collector:
    """Collects the batches of a run in order; all ranks call the same methods in the same order.

    Batch k is begun as early as step ``k - max_staleness`` and finished in step k, so none of its tokens is older than
    ``max_staleness`` versions. On servers that happens in a thread of rank 0, beside the updates; an embedded engine
    draws at once, which makes the same rows and saves no time.
    """

    def __init__(
        self,
        config: Config,
        rollouts: Rollouts,
        sampler: PromptSampler,
        *,
        judge: Callable[[Sequence[Prompt], Sequence[Sample]], list[Verdict]],
        on_rank_0: Callable[[Callable[[], Any]], Any],
        seed: Callable[[int], int],
        pad_id: int,
    ) -> None:
        """Begin nothing yet.

        Args:
            config: The run's configuration.
            rollouts: Draws samples.
            sampler: Where prompts come from; nobody else may take from it.
            judge: Verdicts on samples; called on rank 0 alone, perhaps in another thread.
            on_rank_0: Does work on rank 0; its result or its error reaches every rank.
            seed: The seed of a step's draws.
            pad_id: Fills the rows.
        """
        self._rollout, self._steps = config.rollout, config.run.steps
        self._rollouts, self._sampler = rollouts, sampler
        self._judge, self._on_rank_0, self._seed, self._pad_id = judge, on_rank_0, seed, pad_id
        self._begun: deque[Future[Collected | None]] = deque()
        self._position = sampler.state_dict()

    def take(self, step: int, temperature: float) -> Collected:
        """The batch of ``step``; first, all that may be made from the present weights is begun.

        Args:
            step: The step, one more than at the last call.
            temperature: For what is begun now.

        Raises:
            RLVRError: If samples cannot be drawn or judged.
        """
        for later in range(step + len(self._begun), min(step + self._rollout.max_staleness + 1, self._steps)):
            sampling = SamplingParams(
                temperature, self._rollout.max_new_tokens, self._rollout.samples_per_prompt, self._seed(later)
            )
            self._begun.append(self._rollouts.start(partial(self._collect, sampling)))
        collected: Collected = self._on_rank_0(self._begun.popleft().result)
        self._position = collected.position
        return collected

    def state_dict(self) -> tuple[dict[str, Any], list[Collected]]:
        """Rank 0's: where the prompts go on after the batches that are finished and not taken yet, and those.

        A batch that is being drawn is left out: after a resume it is begun anew, from newer weights.
        """
        finished: list[Collected] = []
        for batch in self._begun:
            if not batch.done() or batch.exception() or (collected := batch.result()) is None:
                break
            finished.append(collected)
        return (finished[-1].position if finished else self._position), finished

    def load_state_dict(self, position: dict[str, Any], finished: Sequence[Collected | None]) -> None:
        """Go on from rank 0's `state_dict`; on the other ranks None stands for each of the batches.

        Raises:
            RLVRError: If the position belongs to other prompts.
        """
        self._sampler.load_state_dict(position)
        self._position = position
        for batch in finished:
            self._begun.append(Future())
            self._begun[-1].set_result(batch)

    def _collect(self, sampling: SamplingParams) -> Collected:
        draft, missing = _Draft(), self._rollout.prompts
        for refill in range(self._rollout.refills + 1):
            prompts = self._sampler.take(math.ceil(missing * self._rollout.over_provision))
            seed = derive_seed(sampling.seed, refill) if refill else sampling.seed
            started = time.perf_counter()
            samples = self._rollouts.draw(prompts, replace(sampling, seed=seed), missing)
            draft.seconds["rollout"] += time.perf_counter() - started
            missing = self._rollouts.agree(partial(self._settle, draft, prompts, samples))
            if not missing:
                break
        draft.metrics.add("drawn_prompts", draft.drawn)
        return Collected(
            batch=self._assemble(draft),
            temperature=sampling.temperature,
            position=self._sampler.state_dict(),
            epoch=self._sampler.epoch,
            metrics=draft.metrics,
            seconds=draft.seconds,
        )

    def _settle(self, draft: _Draft, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> int:
        """Judge what was drawn and keep what can be used; returns how many groups are still missing."""
        started = time.perf_counter()
        verdicts = self._judge(prompts, samples)
        draft.seconds["verify"] += time.perf_counter() - started
        record_samples(samples, verdicts, draft.metrics)
        judged = zip(samples, verdicts, strict=True)
        groups = {position: list(group) for position, group in groupby(judged, key=lambda pair: pair[0].group)}
        draft.drawn += len(prompts)
        self._sampler.give_back([prompt for position, prompt in enumerate(prompts) if position not in groups])
        for group in groups.values():
            contrast = _has_contrast(group)
            draft.metrics.add("contrast_share", contrast)
            (draft.kept if contrast or not self._rollout.refills else draft.spare).append(group)
        return self._rollout.prompts - len(draft.kept)

    def _assemble(self, draft: _Draft) -> RolloutBatch | None:
        """The batch of whole groups; where the refills were not enough, groups without a contrast complete it."""
        groups = [*draft.kept, *draft.spare][: self._rollout.prompts]
        if not groups:
            return None
        samples = [replace(sample, group=number) for number, group in enumerate(groups) for sample, _ in group]
        verdicts = [verdict for group in groups for _, verdict in group]
        return RolloutBatch.from_samples(samples, self._pad_id).with_verdicts(verdicts)


def _has_contrast(group: Group) -> bool:
    """Whether some verdicts are right and some are wrong, so that comparing the samples teaches something."""
    return len({verdict is Verdict.ACCEPTED for _, verdict in group if verdict is not Verdict.INFRA_ERROR}) == 2
