"""Why do trainer and engine disagree about the same tokens? The likely cause, from the gaps between their log-probs."""

from __future__ import annotations

import enum
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

# From synthetic rows. A temperature ratio between 0.7 and 2 explains at least 0.97 of the gaps' variance. So can an
# engine that has nothing in common with the trainer, whose gaps are near -log p, but then the ratio implied is above 5.
_TEMPERATURE_R2 = 0.9
_TEMPERATURE_RATIOS = 0.5, 3.0
# Padded columns leave no gap on the rarer side, unless rounding does; other weights leave a quarter there as long as
# the mean gap is below log 2, where padding would hold half of the mass.
_ONE_SIDED_SHARE = 0.05
_LARGEST_PADDING = math.log(2.0)
_ROUNDING_FACTOR = 4.0
_SIGMAS = 4.0
_FEWEST_TOKENS = 32


class Cause(enum.StrEnum):
    """Why the log-probs of trainer and engine differ."""

    NONE = "none"
    UNDECIDED = "undecided"
    STALE_VERSION = "stale_version"
    TEMPERATURE = "temperature"
    PADDED_VOCABULARY = "padded_vocabulary"
    DTYPE = "dtype"
    DIFFERENT_WEIGHTS = "different_weights"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The finding.

    Attributes:
        cause: The likeliest cause.
        sentence: The evidence and what to look at, for a log.
        temperature_ratio: The engine's temperature over the trainer's, as the gaps imply it, where that is the cause.
    """

    cause: Cause
    sentence: str
    temperature_ratio: float | None = None


def diagnose(
    old_T: torch.Tensor,
    rollout_T: torch.Tensor,
    entropy_T: torch.Tensor,
    *,
    versions: Collection[int],
    expected_version: int,
    eps: float,
    tolerance: float = 1e-4,
) -> Diagnosis:
    """Name the likely cause of the gaps ``rollout - old``. The checks run from the surest evidence to the weakest.

    A wrong temperature shows because log p changes with the inverse temperature beta by ``(log p + H) / beta``, so that
    to first order the gaps are proportional to ``log p + H``. The ratio it implies is good to 1 % within 0.9 to 1.1 and
    to 3 % within 0.7 to 2. Columns of a padded vocabulary that one side fails to mask lower every log-prob of
    that side. Rounding is centred on 0 and small; so are the gaps of weights that differ by little, and the two cannot
    be told apart.

    Args:
        old_T: The trainer's log-probs (nats) of the response tokens under the weights that should have made them.
        rollout_T: The engine's, same shape.
        entropy_T: The trainer's entropies (nats), same shape.
        versions: Versions of the weights that the samples carry.
        expected_version: The version they should carry.
        eps: ``torch.finfo(dtype).eps`` of the coarser of the two computations.
        tolerance: Gap in nats that needs no explanation.
    """
    gap_T, slope_T = (rollout_T - old_T).double(), (old_T + entropy_T).double()
    largest = float(gap_T.abs().max()) if gap_T.numel() else 0.0
    if largest <= tolerance:
        return Diagnosis(Cause.NONE, f"the largest gap is {largest:.1e} nats, within {tolerance:.1e}")
    if stale := sorted(set(versions) - {expected_version}):
        return Diagnosis(
            Cause.STALE_VERSION,
            f"samples carry weight versions {stale} where {expected_version} was due; resync the engine",
        )
    count = gap_T.numel()
    if count < _FEWEST_TOKENS:
        return Diagnosis(Cause.UNDECIDED, f"{count} tokens with a gap of up to {largest:.1e} nats are too few to judge")
    mean, rms = float(gap_T.mean()), float(gap_T.square().mean().sqrt())
    slope, explained = _fit(slope_T, gap_T)
    ratio = 1.0 / (1.0 + slope) if slope > -1.0 else math.inf
    if explained >= _TEMPERATURE_R2 and _TEMPERATURE_RATIOS[0] < ratio < _TEMPERATURE_RATIOS[1]:
        return Diagnosis(
            Cause.TEMPERATURE,
            f"log p + H explains {explained:.0%} of the gaps: the engine's temperature is about {ratio:.3g} times the "
            "trainer's; make the two equal",
            ratio,
        )
    chance = _SIGMAS * rms / math.sqrt(count)
    contrary = float(((gap_T.sign() != math.copysign(1.0, mean)) & (gap_T.abs() > tolerance)).double().mean())
    if contrary <= _ONE_SIDED_SHARE and chance < abs(mean) < _LARGEST_PADDING:
        side = "engine" if mean < 0.0 else "trainer"
        return Diagnosis(
            Cause.PADDED_VOCABULARY,
            f"{1.0 - contrary:.0%} of the gaps point one way, {mean:.1e} nats on average, as if the {side} counted "
            "columns beyond the vocabulary; mask its padded logits",
        )
    # The mean gap of tokens that the engine drew is a divergence, of the order of the square of the gaps.
    if abs(mean) <= chance + rms**2 and rms <= _ROUNDING_FACTOR * eps:
        return Diagnosis(
            Cause.DTYPE, f"the gaps are centred on 0 with {rms:.1e} nats rms, as rounding with eps {eps:.1e} makes them"
        )
    return Diagnosis(
        Cause.DIFFERENT_WEIGHTS,
        f"gaps of {rms:.1e} nats rms fit neither a temperature, nor padded columns, nor rounding with eps {eps:.1e}; "
        "compare the engine's weights with the trainer's",
    )


def _fit(x_T: torch.Tensor, y_T: torch.Tensor) -> tuple[float, float]:
    """Slope of the least-squares line and the share of the variance of ``y`` that it explains."""
    x_T, y_T = x_T - x_T.mean(), y_T - y_T.mean()
    product, x_square, y_square = (float((a * b).sum()) for a, b in ((x_T, y_T), (x_T, x_T), (y_T, y_T)))
    if x_square == 0.0 or y_square == 0.0:
        return 0.0, 0.0
    return product / x_square, product**2 / (x_square * y_square)
