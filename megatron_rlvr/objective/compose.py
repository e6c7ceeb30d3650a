"""What the loss is told of each token: a rollout batch's statistics, a token rule and a step's actuation put together.

Done once per rollout batch, before its updates, on the global batch; mini-batches and micro-batches are cut from the
result, so that no selection depends on how.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_rlvr.entropy import Actuation, TokenBatch, TokenRule
from megatron_rlvr.objective.settings import LossSettings


@dataclass(frozen=True, slots=True)
class BatchStats:
    """What is known of a global rollout batch before its updates; ``[B, L]``, anything where ``mask_BL`` is False.

    Attributes:
        mask_BL: True at the response tokens that train, bool.
        logprob_BL: Log-prob (nats) under the policy that made them, by the trainer.
        entropy_BL: Entropy (nats) of that policy there.
        nucleus_BL: Entropy of its top-p nucleus, where a rule or the signal needs it.
        mismatch_BL: Weight against the mismatch of trainer and engine, if any.
        reference_BL: Log-prob under the reference policy, if the loss has a KL term.
    """

    mask_BL: torch.Tensor
    logprob_BL: torch.Tensor
    entropy_BL: torch.Tensor
    nucleus_BL: torch.Tensor | None = None
    mismatch_BL: torch.Tensor | None = None
    reference_BL: torch.Tensor | None = None


def token_batch(stats: BatchStats, advantages_B: torch.Tensor, *, seed: int = 0) -> TokenBatch:
    """The response tokens of a global rollout batch as a token rule reads them, in row-major order."""
    mask_BL = stats.mask_BL
    row_T = mask_BL.nonzero()[:, 0]
    return TokenBatch(
        logprob=stats.logprob_BL[mask_BL],
        entropy=stats.entropy_BL[mask_BL],
        advantages=advantages_B[row_T],
        row=row_T,
        index=mask_BL.flatten().nonzero().squeeze(1),
        seed=seed,
        nucleus_entropy=None if stats.nucleus_BL is None else stats.nucleus_BL[mask_BL],
    )


def compose(
    stats: BatchStats, advantages_B: torch.Tensor, rule: TokenRule, *, gain: float, seed: int
) -> dict[str, torch.Tensor]:
    """The fields of `LossInputs` that are fixed before the updates, each ``[B, L]`` fp32, 0 outside the mask.

    Args:
        stats: The batch.
        advantages_B: Advantage of each response, whitened already if at all.
        rule: The recipe's token rule.
        gain: The step's strength of it.
        seed: Of a rule that draws.

    Returns:
        ``old_logprob``, ``advantages`` (shaped by the rule) and ``weight`` (the rule's and the mismatch weight's
        product), and where there is one ``penalty``, ``bonus`` and ``reference_logprob``.
    """
    mask_BL = stats.mask_BL
    plan = rule(token_batch(stats, advantages_B, seed=seed), gain)
    mismatch_T = 1.0 if stats.mismatch_BL is None else stats.mismatch_BL[mask_BL]
    flat = {
        "old_logprob": stats.logprob_BL[mask_BL],
        "advantages": plan.advantages,
        "weight": plan.weight * mismatch_T,
        "penalty": plan.penalty,
        "bonus": plan.bonus,
        "reference_logprob": None if stats.reference_BL is None else stats.reference_BL[mask_BL],
    }
    given: dict[str, torch.Tensor] = {}
    for name, value_T in flat.items():
        if value_T is not None:
            given[name] = torch.zeros(mask_BL.shape)
            given[name][mask_BL] = value_T.float()
    return given


def actuated(settings: LossSettings, actuation: Actuation) -> LossSettings:
    """The settings with what the step's actuation changes."""
    low, high = actuation.clip_low, actuation.clip_high
    return replace(
        settings,
        positive_weight=settings.positive_weight * actuation.positive_weight,
        negative_weight=settings.negative_weight * actuation.negative_weight,
        bonus=settings.bonus + actuation.bonus,
        clip_low=settings.clip_low if low is None else low,
        clip_high=settings.clip_high if high is None else high,
    )
