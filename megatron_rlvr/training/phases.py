"""The pure parts of a step: from verdicts to advantages, from a batch to mini-batches, from samples to statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_rlvr.config import ObjectiveConfig
from megatron_rlvr.core import FinishReason, RolloutBatch, Sample, StepMetrics, Verdict
from megatron_rlvr.entropy import mean_entropy
from megatron_rlvr.evaluation import EvalMetrics, evaluate_answers
from megatron_rlvr.objective import grpo_advantages
from megatron_rlvr.policy.policy import TrainingRows
from megatron_rlvr.rollout import derive_seed


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """One step's rows, ready for the updates.

    Attributes:
        rows: All rows of the step.
        groups_B: Prompt index of each row.
        entropy: H_k: token-mean entropy (nats) of the policy that made the rollouts.
    """

    rows: TrainingRows
    groups_B: torch.Tensor
    entropy: float


def prepare(
    batch: RolloutBatch, logprobs_BL: torch.Tensor, entropy_BL: torch.Tensor, metrics: StepMetrics
) -> PreparedBatch:
    """Advantages and the entropy signal of a verified batch; everything here is identical on every rank.

    Args:
        batch: The verified rows.
        logprobs_BL: The trainer's log-probs of the response tokens under the weights that made them.
        entropy_BL: The trainer's entropies at the same positions.
        metrics: Receives the step's rollout statistics.

    Raises:
        RLVRError: If no row has a verdict.
    """
    mask_BL = batch.response_mask_BL & batch.valid_B[:, None]
    tokens = int(mask_BL.sum())
    # Sums over one flat, ordered list of tokens in float64: the same number in every layout.
    entropy_sum = float(entropy_BL[mask_BL].double().sum())
    signal = mean_entropy(entropy_sum, tokens)
    advantages_B = grpo_advantages(batch.rewards_B, batch.groups_B, batch.valid_B)
    metrics.add("entropy", entropy_sum, tokens)
    gap_T = (logprobs_BL - batch.rollout_logprobs_BL)[mask_BL].double()
    # k3 of KL(rollout || trainer), Schulman 2020: zero where both agree, never negative
    metrics.add("rollout_trainer_kl", float((gap_T.exp() - 1 - gap_T).sum()), tokens)
    metrics.add("rollout_trainer_gap_max", float(gap_T.abs().max()))
    metrics.add("reward_mean", float(batch.rewards_B[batch.valid_B].sum()), int(batch.valid_B.sum()))
    metrics.add("informative_share", int((advantages_B != 0).sum()), len(batch))
    rows = TrainingRows(
        tokens_BL=batch.tokens_BL,
        mask_BL=mask_BL,
        old_logprobs_BL=logprobs_BL,
        advantages_BL=advantages_B[:, None].expand_as(logprobs_BL),
    )
    return PreparedBatch(rows=rows, groups_B=batch.groups_B, entropy=signal)


def minibatches(batch: PreparedBatch, objective: ObjectiveConfig, seed: int) -> Iterator[TrainingRows]:
    """The step's mini-batches: each epoch deals whole prompts, shuffled by ``seed``, into ``objective.minibatches``."""
    for epoch in range(objective.epochs):
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        place_of_prompt = torch.randperm(int(batch.groups_B.max()) + 1, generator=generator)
        for rows in torch.argsort(place_of_prompt[batch.groups_B], stable=True).chunk(objective.minibatches):
            yield batch.rows.select(rows)


def evaluate(samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> EvalMetrics:
    """Accuracy of the samples that have a verdict, with pass@k for k = 1, 2, 4, … up to the fewest of any prompt.

    Raises:
        RLVRError: If a prompt has no sample with a verdict.
    """
    correct: dict[int, list[bool]] = {sample.group: [] for sample in samples}
    answers: dict[int, list[str]] = {sample.group: [] for sample in samples}
    for sample, verdict in zip(samples, verdicts, strict=True):
        if verdict is not Verdict.INFRA_ERROR:
            correct[sample.group].append(verdict is Verdict.ACCEPTED)
            answers[sample.group].append(sample.text)
    fewest = min(map(len, correct.values()))
    powers_of_two = [2**power for power in range(fewest.bit_length())]
    return evaluate_answers(list(correct.values()), list(answers.values()), powers_of_two)


def record_samples(samples: Sequence[Sample], verdicts: Sequence[Verdict], metrics: StepMetrics) -> None:
    """Add response lengths, truncation and the share of every verdict to ``metrics``."""
    count = len(samples)
    metrics.add("response_tokens", sum(len(sample.response_ids) for sample in samples), count)
    metrics.add("truncated_share", sum(sample.finish_reason is FinishReason.LENGTH for sample in samples), count)
    for verdict in Verdict:
        metrics.add(f"verdict/{verdict.value}", sum(given is verdict for given in verdicts), count)
