r"""The policy loss: PPO's clipped surrogate with a weight on tokens of positive advantage.

For a token with advantage A, ratio r = exp(logprob - old_logprob) and positive weight lambda

    loss = - w A r',    w = lambda where A > 0, else 1,    r' = min(r, 1 + high) where A > 0, else max(r, 1 - low)

which is PPO's -w min(r A, clip(r, 1 - low, 1 + high) A). Because the surrogate is linear in A on either side of 0, the
weight equals scaling positive advantages after normalisation; lambda = 1 is GRPO and lambda = 0 trains on
non-positive advantages alone.

Sources: PPO, arXiv:1707.06347; separate clip widths, DAPO, arXiv:2503.14476; Positive-Advantage Reweighting,
arXiv:2511.05993; the KL estimate k3, J. Schulman, "Approximating KL divergence", 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_rlvr.core import RLVRError

Metrics = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Token quantities of one micro-batch, all of one shape, padded or packed.

    Attributes:
        logprob: Log-probability (nats) of each token under the policy being trained; carries the gradient.
        old_logprob: The same under the policy before this step's updates.
        advantages: Advantage of each token's response, already normalised.
        entropy: Entropy (nats) of the policy being trained at each token.
        mask: True where a token takes part, bool. What the others hold, NaN and inf included, reaches nothing.

    Raises:
        ValueError: If the shapes differ or the mask is not bool.
    """

    logprob: torch.Tensor
    old_logprob: torch.Tensor
    advantages: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor

    def __post_init__(self) -> None:
        """Compare shapes before broadcasting can hide a mistake."""
        for name in ("old_logprob", "advantages", "entropy", "mask"):
            if (shape := getattr(self, name).shape) != self.logprob.shape:
                raise ValueError(f"{name} has shape {list(shape)} but logprob has {list(self.logprob.shape)}")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {self.mask.dtype}")


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """The loss of each token and sums over them; a mean is taken after adding up micro-batches and ranks.

    Attributes:
        losses: Loss of each token, of the inputs' shape, differentiable; 0 where masked out.
        count: Number of masked-in tokens, 0-d int64.
        metrics: Detached (sum, count) of each metric, 0-d float64 and int64.
    """

    losses: torch.Tensor
    count: torch.Tensor
    metrics: Metrics

    @property
    def loss_sum(self) -> torch.Tensor:
        """Their sum, 0-d; over the global count it is the token mean of the global batch, however that was split."""
        return self.losses.sum()


def policy_loss(inputs: LossInputs, *, clip_low: float, clip_high: float, positive_weight: float) -> LossOutputs:
    """Clipped surrogate of each token, with ``positive_weight`` on tokens whose advantage is above 0.

    The metrics, each over all masked-in tokens: ``clip_fraction_high`` (A > 0 and r > 1 + clip_high),
    ``clip_fraction_low`` (A < 0 and r < 1 - clip_low), ``approx_kl`` (k3 estimate of KL(old || trained), nats),
    ``ratio``, ``policy_entropy`` (nats), ``positive_fraction`` and ``negative_fraction`` (share of A > 0, A < 0).

    Args:
        inputs: Token quantities.
        clip_low: Width of the clip below ratio 1, in [0, 1]; 1 never clips.
        clip_high: Width of the clip above ratio 1, not negative; ``inf`` never clips.
        positive_weight: The weight lambda, finite and not negative.

    Raises:
        RLVRError: If a width or the weight is out of range.
    """
    if not 0.0 <= clip_low <= 1.0 or not clip_high >= 0.0:
        raise RLVRError(f"clip_low {clip_low} must lie in [0, 1] and clip_high {clip_high} must not be negative")
    if not 0.0 <= positive_weight < math.inf:
        raise RLVRError(f"positive_weight is {positive_weight} but a loss weight is finite and not negative")
    mask = inputs.mask
    advantages = torch.where(mask, inputs.advantages.detach(), 0.0)
    # Masking before the difference keeps NaN and inf of masked-out tokens away from the gradient as well.
    log_ratio = torch.where(mask, inputs.logprob, 0.0) - torch.where(mask, inputs.old_logprob.detach(), 0.0)
    log_high = math.log1p(clip_high)
    log_low = math.log1p(-clip_low) if clip_low < 1.0 else -math.inf
    positive, negative = advantages > 0, advantages < 0
    weighted = torch.where(positive, positive_weight * advantages, advantages)
    # Clipping the logarithm, and dropping tokens of no weight before exp, keeps an overflowing ratio out of the loss
    # wherever it has no part in it; 0 * inf would be NaN.
    clipped = torch.where(positive, log_ratio.clamp(max=log_high), log_ratio.clamp(min=log_low))
    surrogate = torch.where(weighted != 0, clipped, 0.0).exp() * weighted
    count = mask.sum()
    with torch.no_grad():
        wide_log_ratio = log_ratio.double()
        values = {
            "clip_fraction_high": positive & (log_ratio > log_high),
            "clip_fraction_low": negative & (log_ratio < log_low),
            "approx_kl": wide_log_ratio.expm1() - wide_log_ratio,
            "ratio": torch.where(mask, wide_log_ratio.exp(), 0.0),
            "policy_entropy": torch.where(mask, inputs.entropy, 0.0),
            "positive_fraction": positive,
            "negative_fraction": negative,
        }
        metrics = {name: (value.sum(dtype=torch.float64), count) for name, value in values.items()}
    return LossOutputs(losses=-surrogate, count=count, metrics=metrics)
