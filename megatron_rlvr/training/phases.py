"""The pure parts of a step: from verdicts to advantages, from a batch to mini-batches, from samples to statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_rlvr.config import ObjectiveConfig, RolloutConfig
from megatron_rlvr.core import FinishReason, RLVRError, RolloutBatch, Sample, StepMetrics, Verdict
from megatron_rlvr.entropy import Recipe, TokenRule, mean_entropy
from megatron_rlvr.entropy.signal import sequence_sums
from megatron_rlvr.entropy.token_masks import masked_nucleus_entropy
from megatron_rlvr.evaluation import EvalMetrics, evaluate_answers
from megatron_rlvr.objective import (
    BatchStats,
    MismatchSettings,
    Outcomes,
    compose,
    mismatch,
    token_batch,
    token_scale,
)
from megatron_rlvr.policy.policy import TokenPass, TrainingRows
from megatron_rlvr.rollout import derive_seed


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """One step's rows before a recipe has decided anything; identical on every rank.

    Attributes:
        tokens_BL: Token ids.
        groups_B: Prompt index of each row.
        outcomes: What the advantage estimators read.
        stats: What is known of the response tokens.
        entropy: H_k: token-mean entropy (nats) of the policy that made the rollouts.
        signal: The entropy (nats) that steers, None where it is known only after the updates.
    """

    tokens_BL: torch.Tensor
    groups_B: torch.Tensor
    outcomes: Outcomes
    stats: BatchStats
    entropy: float
    signal: float | None


def prepare(
    batch: RolloutBatch,
    token_pass: TokenPass,
    metrics: StepMetrics,
    *,
    recipe: Recipe,
    correction: MismatchSettings | None = None,
    reference_BL: torch.Tensor | None = None,
) -> PreparedBatch:
    """Outcomes, token statistics and the entropy signal of a verified batch.

    Args:
        batch: The verified rows.
        token_pass: The trainer's statistics of the response tokens under the weights that made them.
        metrics: Receives the step's rollout statistics.
        recipe: Says which entropy steers.
        correction: How tokens are weighted against the mismatch of engine and trainer.
        reference_BL: Log-probs under the reference policy.

    Raises:
        RLVRError: If no row has a verdict.
    """
    mask_BL = batch.response_mask_BL & batch.valid_B[:, None]
    logprobs_BL, entropy_BL = token_pass.logprobs_BL, token_pass.entropy_BL
    lengths_B = mask_BL.sum(1)
    tokens = int(lengths_B.sum())
    # Sums over one flat, ordered list of tokens in float64: the same number in every layout.
    entropy_sum = float(entropy_BL[mask_BL].double().sum())
    entropy = mean_entropy(entropy_sum, tokens)
    metrics.add("entropy", entropy_sum, tokens)
    gap_T = (logprobs_BL - batch.rollout_logprobs_BL)[mask_BL].double()
    metrics.add("rollout_trainer_kl", _k3(gap_T), tokens)
    metrics.add("rollout_trainer_gap_max", float(gap_T.abs().max()))
    metrics.add("reward_mean", float(batch.rewards_B[batch.valid_B].sum()), int(batch.valid_B.sum()))
    mismatch_BL = None
    if correction is not None:
        mismatch_BL, _, found = mismatch(logprobs_BL, batch.rollout_logprobs_BL, mask_BL, correction)
        for name, (total, count) in found.items():
            metrics.add(name, float(total), float(count))
    outcomes = Outcomes(
        batch.rewards_B,
        batch.groups_B,
        batch.valid_B,
        lengths_B=lengths_B,
        mean_logprob_B=torch.where(mask_BL, logprobs_BL, 0.0).sum(1) / lengths_B.clamp(min=1),
    )
    stats = BatchStats(mask_BL, logprobs_BL, entropy_BL, token_pass.nucleus_BL, mismatch_BL, reference_BL)
    signal = _signal(recipe, stats, entropy)
    return PreparedBatch(batch.tokens_BL, batch.groups_B, outcomes, stats, entropy, signal)


def handle_overlong(batch: RolloutBatch, rollout: RolloutConfig) -> RolloutBatch:
    """The batch with ``rollout.overlong`` done to it, after verification.

    ``drop``: the tokens of truncated responses are not trained on and not counted; their reward still counts for the
    group. ``penalize``: over the last ``overlong_buffer`` tokens of the budget the reward falls linearly by 1.

    Source: DAPO, arXiv:2503.14476, section 3.4 (overlong filtering, and Eq. 13).
    """
    if rollout.overlong == "drop":
        return replace(batch, response_mask_BL=batch.response_mask_BL & ~batch.truncated_B[:, None])
    if rollout.overlong == "penalize":
        excess_B = batch.response_mask_BL.sum(1) - (rollout.max_new_tokens - rollout.overlong_buffer)
        return replace(batch, rewards_B=batch.rewards_B - (excess_B / rollout.overlong_buffer).clamp(0.0, 1.0))
    return batch


def token_ages(batch: RolloutBatch, step: int, max_staleness: int) -> torch.Tensor:
    """How many versions older than the step's weights those were that made each response token, ``[B, L]``, else 0.

    Raises:
        RLVRError: If a token is older than ``max_staleness``, or from weights that do not exist yet.
    """
    ages_BL = torch.where(batch.response_mask_BL, step - batch.versions_BL, 0)
    oldest, newest = int(ages_BL.max()), int(ages_BL.min())
    if oldest > max_staleness or newest < 0:
        wrong = step - (oldest if oldest > max_staleness else newest)
        raise RLVRError(
            f"step {step} got tokens of weight version {wrong}, where {step - max_staleness} to {step} are due "
            f"(rollout.max_staleness={max_staleness}); an engine serves other weights, restart the run to resync it"
        )
    return ages_BL


def record_ages(batch: RolloutBatch, ages_BL: torch.Tensor, stats: BatchStats, metrics: StepMetrics) -> None:
    """Add the mean age of the trained tokens and, where some are stale, KL(rollout || trainer) by age."""
    ages_T = ages_BL[stats.mask_BL]
    metrics.add("staleness", float(ages_T.sum()), len(ages_T))
    if not ages_T.any():
        return
    gap_T = (stats.logprob_BL - batch.rollout_logprobs_BL)[stats.mask_BL].double()
    for age in range(int(ages_T.max()) + 1):
        gaps = gap_T[ages_T == age]
        if len(gaps):
            metrics.add(f"rollout_trainer_kl/age_{age}", _k3(gaps), len(gaps))


def _k3(gap_T: torch.Tensor) -> float:
    """Sum of k3 of KL(rollout || trainer), Schulman 2020: zero where both agree, never negative."""
    return float((gap_T.exp() - 1 - gap_T).sum())


def _signal(recipe: Recipe, stats: BatchStats, entropy: float) -> float | None:
    """The entropy that the recipe's control reads before the updates."""
    match recipe.control.signal:
        case "rollout":
            return entropy
        case "sequence":
            sums_B = torch.where(stats.mask_BL, stats.entropy_BL, 0.0).double().sum(1)
            return mean_entropy(*sequence_sums(sums_B, stats.mask_BL.sum(1)))
        case "nucleus":
            return masked_nucleus_entropy(token_batch(stats, torch.zeros(len(stats.mask_BL))), recipe.nucleus_share)
        case "policy":
            return None


def weigh(
    batch: PreparedBatch, advantages_B: torch.Tensor, rule: TokenRule, metrics: StepMetrics, *, gain: float, seed: int
) -> TrainingRows:
    """The step's rows with everything that the loss is told of their tokens.

    Args:
        batch: The prepared rows.
        advantages_B: Advantage of each row.
        rule: The recipe's token rule.
        metrics: Receives the share of rows that teach something.
        gain: The step's strength of the rule.
        seed: Of a rule that draws.
    """
    metrics.add("informative_share", int((advantages_B != 0).sum()), len(advantages_B))
    given = compose(batch.stats, advantages_B, rule, gain=gain, seed=seed)
    return TrainingRows(batch.tokens_BL, batch.stats.mask_BL, given)


def minibatches(
    rows: TrainingRows,
    groups_B: torch.Tensor,
    objective: ObjectiveConfig,
    seed: int,
    *,
    aggregation: tuple[str, float | None] = ("token_mean", None),
) -> Iterator[TrainingRows]:
    """The step's mini-batches: each epoch deals whole prompts, shuffled by ``seed``, into ``objective.minibatches``."""
    for epoch in range(objective.epochs):
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        place_of_prompt = torch.randperm(int(groups_B.max()) + 1, generator=generator)
        for chosen in torch.argsort(place_of_prompt[groups_B], stable=True).chunk(objective.minibatches):
            part = rows.select(chosen)
            how, constant = aggregation
            if how != "token_mean":
                part.given["scale"] = token_scale(part.mask_BL, how, constant)
            yield part


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
