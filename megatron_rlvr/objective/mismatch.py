r"""Correction for a rollout engine whose log-probs differ from the trainer's under the same weights.

With rho = exp(old log-prob - rollout log-prob) of a token, of a whole response (the product over its tokens) or their
geometric mean, a token's loss is weighted by rho: either truncated to [low, high], or left alone inside and dropped
outside. `MISMATCHES` has the usual rules by name:

    tis      Truncated importance sampling: Yao et al., "Your efficient RL framework secretly brings you off-policy RL
             training", 2025; bounds of slime
    icepop   arXiv:2510.18855; bounds of NeMo-RL
    mis_*    Masked importance sampling by level: Liu et al., "When speed kills stability", 2025; bounds and veto of
             slime, the geometric ones of SkyRL
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_rlvr.core import RLVRError
from megatron_rlvr.objective.inputs import Metrics

LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "mask")


@dataclass(frozen=True, slots=True)
class MismatchSettings:
    """The rule of the correction; building one checks it.

    Attributes:
        level: Whose ratio decides: ``token``, ``sequence`` or ``geometric``.
        mode: ``truncate`` moves ratios to the bounds, ``mask`` drops what lies outside.
        low: Smallest ratio, not negative.
        high: Largest ratio, finite, at least ``low``.
        veto: A response with a token of a ratio below this is dropped whole; 0 vetoes none.

    Raises:
        RLVRError: If a value is not known or out of range.
    """

    level: str = "token"
    mode: str = "truncate"
    low: float = 0.0
    high: float = 2.0
    veto: float = 0.0

    def __post_init__(self) -> None:
        """Check every value by itself."""
        if self.level not in LEVELS:
            raise RLVRError(f"mismatch level is {self.level!r}; choose one of {', '.join(LEVELS)}")
        if self.mode not in MODES:
            raise RLVRError(f"mismatch mode is {self.mode!r}; choose one of {', '.join(MODES)}")
        if not 0.0 <= self.low <= self.high < math.inf or self.high == 0.0:
            raise RLVRError(
                f"mismatch bounds are {self.low} to {self.high}; give 0 <= low <= high, high finite and not 0"
            )
        if not 0.0 <= self.veto < 1.0:
            raise RLVRError(f"mismatch veto is {self.veto}; give a ratio below 1, such as 1e-4, or 0 for none")


MISMATCHES = {
    "tis": MismatchSettings("token", "truncate", 0.0, 2.0),
    "icepop": MismatchSettings("token", "mask", 0.5, 5.0),
    "mis_token": MismatchSettings("token", "mask", 0.5, 2.0, veto=1e-4),
    "mis_sequence": MismatchSettings("sequence", "mask", 0.5, 2.0, veto=1e-4),
    "mis_geometric": MismatchSettings("geometric", "mask", 0.99, 1.01, veto=1e-4),
}


def mismatch(
    old_BL: torch.Tensor, rollout_BL: torch.Tensor, mask_BL: torch.Tensor, settings: MismatchSettings
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """The weight of every token in the policy term, once for a rollout batch.

    Dropped tokens keep their place in the token count that the loss is divided by: others do not gain from it.
    Bounds are compared in logarithms, so that no ratio overflows.

    Args:
        old_BL: The trainer's log-probs (nats) under the weights that made the rollouts, ``[B, L]``.
        rollout_BL: The engine's, same shape.
        mask_BL: True at response tokens, bool. What the others hold reaches nothing.
        settings: The rule.

    Returns:
        Weights ``[B, L]``, 0 where dropped or masked out; True where a token is kept, ``[B, L]``; and metrics:
        ``mismatch_weight`` (mean over tokens), ``mismatch_low_fraction`` and ``mismatch_high_fraction`` (tokens whose
        ratio lies outside), ``mismatch_dropped`` (tokens) and ``mismatch_veto_fraction`` (responses).
    """
    mask_BL = mask_BL.bool()
    gap_BL = torch.where(mask_BL, old_BL.detach() - rollout_BL.detach(), 0.0)
    lengths_B = mask_BL.sum(dim=1)
    log_BL = gap_BL
    if settings.level != "token":
        divisor_B = lengths_B.clamp(min=1) if settings.level == "geometric" else torch.ones_like(lengths_B)
        log_BL = (gap_BL.sum(dim=1) / divisor_B)[:, None].expand_as(gap_BL)
    low, high = _log(settings.low), _log(settings.high)
    below_BL, above_BL = mask_BL & (log_BL < low), mask_BL & (log_BL > high)
    vetoed_B = (mask_BL & (gap_BL < _log(settings.veto))).any(dim=1)
    kept_BL = mask_BL & ~vetoed_B[:, None]
    if settings.mode == "mask":
        kept_BL = kept_BL & ~below_BL & ~above_BL
    weight_BL = torch.where(kept_BL, log_BL, 0.0).clamp(low, high).exp()
    weight_BL = torch.where(kept_BL, weight_BL, 0.0)
    tokens, rows = mask_BL.sum(), (lengths_B > 0).sum()
    metrics = {
        "mismatch_weight": (weight_BL, tokens),
        "mismatch_low_fraction": (below_BL, tokens),
        "mismatch_high_fraction": (above_BL, tokens),
        "mismatch_dropped": (mask_BL & ~kept_BL, tokens),
        "mismatch_veto_fraction": (vetoed_B, rows),
    }
    return weight_BL, kept_BL, {name: (value.sum(dtype=torch.float64), n) for name, (value, n) in metrics.items()}


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0.0 else -math.inf
