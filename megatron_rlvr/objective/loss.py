"""The policy loss: weights by sign and token, a surrogate, and what is added to it; see the package for the order."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import huber_loss

from megatron_rlvr.objective.inputs import LossInputs, LossOutputs
from megatron_rlvr.objective.kl import KL_ESTIMATORS
from megatron_rlvr.objective.settings import LossSettings
from megatron_rlvr.objective.surrogates import Gain, gain, log_ratios, opsm_drops

# Nats within which |log r| is rounded off: before the first update log r is a rounding error, whose sign would else
# be a gradient of full strength.
KINK = 1e-2


def policy_loss(inputs: LossInputs, settings: LossSettings) -> LossOutputs:
    """Loss of each token.

    With advantage A, gain g of the surrogate, and w the weight of the sign of A (strictly: A = 0 has neither) times the
    token's weight,

        loss = scale (-w A g + kl KL(trained || reference) + penalty |log p - old log p|_KINK - alpha bonus H)

    where a token with a penalty has its plain ratio for g, and |x|_KINK is x^2 / (2 KINK) within KINK, |x| - KINK / 2
    beyond.

    Metrics, each over all masked-in tokens and without ``scale``: ``clip_fraction_high`` (A > 0 and ratio above
    1 + clip_high), ``clip_fraction_low`` (A < 0 and ratio below 1 - clip_low; under ``gspo`` both of the sequence's
    ratio), ``approx_kl`` (k3 estimate of KL(old || trained), nats), ``ratio``, ``policy_entropy`` (nats),
    ``positive_fraction`` and ``negative_fraction`` (share of A > 0, A < 0). Where the inputs or settings that they
    speak of are present also ``weight`` (w), ``opsm_fraction``, ``kl_reference`` (nats), ``penalty``,
    ``entropy_bonus`` (alpha bonus H), and with ``entropy_slope``

        entropy_drive/positive, /negative                      sum of slope times -dloss/dlogprob of the policy term
        entropy_drive/withheld_positive, /withheld_negative    what the tokens that clipping silenced would have added
        entropy_drive/bonus                                    the same of the entropy bonus, given entropy_grad_norm

    for either sign of A, ``scale`` included: to first order the change of entropy by a unit step in the logits.

    Raises:
        ValueError: If the settings need a tensor that the inputs lack.

    Source of the positive weight: Positive-Advantage Reweighting, arXiv:2511.05993.
    """
    mask = inputs.mask
    advantages = inputs.fixed("advantages")
    log_ratio, clipped_ratio = log_ratios(inputs, settings)
    weight = _weight(inputs, settings, advantages)
    values: dict[str, torch.Tensor] = {}
    if settings.opsm < math.inf:
        dropped = opsm_drops(inputs, settings, log_ratio)
        weight = weight.masked_fill(dropped, 0.0)
        values["opsm_fraction"] = dropped
    if inputs.weight is not None:
        values["weight"] = weight
    weighted = advantages * weight
    # A token of no weight leaves before exp: 0 * inf would be NaN.
    active = weighted != 0
    surrogate = gain(
        torch.where(active, clipped_ratio, 0.0), torch.where(active, inputs.logprob, 0.0), advantages > 0, settings
    )
    if inputs.penalty is not None:
        surrogate = _unclipped(surrogate, torch.where(active, log_ratio, 0.0), inputs.fixed("penalty", 0.0) != 0)
    losses = -weighted * surrogate.value
    for name, (coefficient, term) in _added(inputs, settings, log_ratio).items():
        values[name] = term
        if coefficient != 0.0:
            losses = losses + coefficient * term
    scale = inputs.fixed("scale")
    if inputs.scale is not None:
        losses = losses * scale
    values |= _token_values(inputs, settings, log_ratio.detach(), clipped_ratio.detach())
    if inputs.entropy_slope is not None:
        values |= _entropy_drive(surrogate, scale * weighted, inputs.fixed("entropy_slope"))
        # A step along the gradient of the entropy itself; that of a nucleus has another gradient, and is left out.
        pull = settings.bonus if inputs.nucleus_entropy is None else 0.0
        norm = inputs.fixed("entropy_grad_norm", 0.0)
        values["entropy_drive/bonus"] = pull * scale * inputs.fixed("bonus") * norm.square()
    count = mask.sum()
    metrics = {name: (value.detach().sum(dtype=torch.float64), count) for name, value in values.items()}
    return LossOutputs(losses=losses, count=count, metrics=metrics)


def _unclipped(surrogate: Gain, log_ratio: torch.Tensor, penalised: torch.Tensor) -> Gain:
    """The gain with a free ratio where KL-Cov's penalty takes the place of the clip."""
    ratio = torch.where(penalised, log_ratio, 0.0).exp()
    return Gain(
        torch.where(penalised, ratio, surrogate.value),
        torch.where(penalised, ratio.detach(), surrogate.rate),
        surrogate.withheld & ~penalised,
    )


def _weight(inputs: LossInputs, settings: LossSettings, advantages: torch.Tensor) -> torch.Tensor:
    """Weight of each token in the policy term: that of its sign times its own; 0 where masked out."""
    own = inputs.fixed("weight")
    own = torch.where(advantages > 0, settings.positive_weight * own, own)
    return torch.where(advantages < 0, settings.negative_weight * own, own)


def _added(
    inputs: LossInputs, settings: LossSettings, log_ratio: torch.Tensor
) -> dict[str, tuple[float, torch.Tensor]]:
    """The terms beside the surrogate, by their metric's name: a coefficient and a differentiable value."""
    terms: dict[str, tuple[float, torch.Tensor]] = {}
    if settings.kl > 0.0:
        inputs.need("reference_logprob", "a positive kl")
    if inputs.reference_logprob is not None:
        difference = torch.where(inputs.mask, inputs.logprob, 0.0) - inputs.fixed("reference_logprob")
        terms["kl_reference"] = settings.kl, KL_ESTIMATORS[settings.kl_estimator](difference)
    if inputs.penalty is not None:
        penalty = inputs.fixed("penalty")
        apart = torch.where(penalty != 0, log_ratio, 0.0)
        terms["penalty"] = (
            1.0,
            penalty * huber_loss(apart, torch.zeros_like(apart), reduction="none", delta=KINK) / KINK,
        )
    if settings.bonus != 0.0:
        share = inputs.fixed("bonus")
        entropy = inputs.entropy if inputs.nucleus_entropy is None else inputs.nucleus_entropy
        terms["entropy_bonus"] = -1.0, settings.bonus * share * torch.where(share != 0, entropy, 0.0)
    return terms


def _token_values(
    inputs: LossInputs, settings: LossSettings, log_ratio: torch.Tensor, clipped_ratio: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The metrics that every loss has, token by token."""
    low, high = settings.log_clip
    advantages = inputs.fixed("advantages")
    positive, negative = advantages > 0, advantages < 0
    wide = log_ratio.double()
    return {
        "clip_fraction_high": positive & (clipped_ratio > high),
        "clip_fraction_low": negative & (clipped_ratio < low),
        "approx_kl": wide.expm1() - wide,
        "ratio": torch.where(inputs.mask, wide.exp(), 0.0),
        "policy_entropy": inputs.fixed("entropy"),
        "positive_fraction": positive,
        "negative_fraction": negative,
    }


def _entropy_drive(surrogate: Gain, weighted: torch.Tensor, slope: torch.Tensor) -> dict[str, torch.Tensor]:
    """First-order push of the policy term on the entropy, by sign of the advantage, and what clipping held back."""
    push = weighted * surrogate.rate * slope
    acting = torch.where(surrogate.withheld, 0.0, push)
    withheld = torch.where(surrogate.withheld, push, 0.0)
    drive: dict[str, torch.Tensor] = {}
    for sign, side in (("positive", weighted > 0), ("negative", weighted < 0)):
        drive[f"entropy_drive/{sign}"] = torch.where(side, acting, 0.0)
        drive[f"entropy_drive/withheld_{sign}"] = torch.where(side, withheld, 0.0)
    return drive
