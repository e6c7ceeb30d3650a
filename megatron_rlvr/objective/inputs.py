"""What the policy loss takes and returns, and the arithmetic of masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Metrics = dict[str, tuple[torch.Tensor, torch.Tensor]]

_FLOATING = (
    "weight",
    "scale",
    "penalty",
    "bonus",
    "reference_logprob",
    "nucleus_entropy",
    "entropy_slope",
    "entropy_grad_norm",
)


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Token quantities of one micro-batch, all of one shape, padded or packed. ``None`` stands for absent.

    Attributes:
        logprob: Log-probability (nats) of each token under the policy being trained; carries the gradient.
        old_logprob: The same under the policy before this step's updates.
        advantages: Advantage of each token, already normalised; its sign decides which side a token is on.
        entropy: Entropy (nats) of the policy being trained at each token; carries the gradient of the bonus.
        mask: True where a token takes part, bool. What the others hold, NaN and inf included, reaches nothing.
        weight: Weight of each token in the policy term: token rules times mismatch correction. Absent is 1.
        scale: Factor on everything a token contributes, from `token_scale`. Absent is 1, the token mean.
        penalty: Coefficient of ``|logprob - old_logprob|``, KL-Cov's penalty, which replaces the clip of the ratio;
            0 where a token has none.
        bonus: Share of the entropy bonus that each token gets. Absent is 1.
        reference_logprob: Log-probability under the reference policy.
        nucleus_entropy: Takes the place of ``entropy`` in the bonus.
        sequence: Which response a token belongs to, int64; any ids that differ within a call.
        entropy_slope: First-order change of the entropy per unit step along the gradient of the token's log-prob in
            the logits, as `megatron_rlvr.vocab.TokenExtras` has it.
        entropy_grad_norm: Norm of the gradient of the entropy in the logits, from there too; with ``entropy_slope``.

    Raises:
        ValueError: If the shapes differ, the mask is not bool or the sequence ids are not int64.
    """

    logprob: torch.Tensor
    old_logprob: torch.Tensor
    advantages: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor
    weight: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    penalty: torch.Tensor | None = None
    bonus: torch.Tensor | None = None
    reference_logprob: torch.Tensor | None = None
    nucleus_entropy: torch.Tensor | None = None
    sequence: torch.Tensor | None = None
    entropy_slope: torch.Tensor | None = None
    entropy_grad_norm: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Compare shapes before broadcasting can hide a mistake."""
        for name in ("old_logprob", "advantages", "entropy", "mask", "sequence", *_FLOATING):
            value: torch.Tensor | None = getattr(self, name)
            if value is not None and value.shape != self.logprob.shape:
                raise ValueError(f"{name} has shape {list(value.shape)} but logprob has {list(self.logprob.shape)}")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {self.mask.dtype}")
        if self.sequence is not None and self.sequence.dtype != torch.int64:
            raise ValueError(f"sequence must be int64, got {self.sequence.dtype}")

    def need(self, name: str, why: str) -> torch.Tensor:
        """The optional tensor ``name``.

        Raises:
            ValueError: If it was not given, saying that ``why`` needs it.
        """
        value: torch.Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"{why} needs LossInputs.{name}, which was not given")
        return value

    def fixed(self, name: str, absent: float = 1.0) -> torch.Tensor:
        """The tensor ``name``, or ``absent`` everywhere in its place, without gradient and 0 where masked out."""
        value: torch.Tensor | None = getattr(self, name)
        if value is None:
            return torch.where(self.mask, torch.full_like(self.logprob.detach(), absent), 0.0)
        return torch.where(self.mask, value.detach(), 0.0)


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
        """Their sum, 0-d; over the global count it is the mean of the global batch, however that was split."""
        return self.losses.sum()


@dataclass(frozen=True, slots=True)
class Objective:
    """What an update minimises and what it needs to be told.

    Attributes:
        loss: Losses and metrics of some response tokens; its sum over the global mini-batch is divided by their count.
        separable: False where a token's loss depends on others of its sequence; costs a second pass through the head.
        slope: Whether ``loss`` reads ``LossInputs.entropy_slope``.
        nucleus: Top-p of the nucleus whose entropy ``loss`` reads as ``LossInputs.nucleus_entropy``; None for none.
    """

    loss: Callable[[LossInputs], LossOutputs]
    separable: bool = True
    slope: bool = False
    nucleus: float | None = None


def sequence_mean(values: torch.Tensor, sequence: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """For each masked-in token, the mean of ``values`` over the masked-in tokens of its sequence; 0 elsewhere."""
    index = torch.unique(sequence[mask], return_inverse=True)[1]
    totals = values.new_zeros(index.numel()).index_add(0, index, values[mask])
    counts = values.new_zeros(index.numel()).index_add(0, index, torch.ones_like(values[mask]))
    return torch.zeros_like(values).masked_scatter(mask, (totals / counts.clamp(min=1.0))[index])
