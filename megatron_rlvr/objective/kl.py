"""Estimates of KL(policy || reference) from a sampled token, as terms of a loss.

With d = log p - log p_ref of a token drawn from the policy:

- ``k1`` = d. Unbiased and of either sign. As a loss it does nothing in expectation: the gradient of d is that of
  log p, whose mean is 0.
- ``k2`` = d^2 / 2. Biased, never negative. Its gradient, d grad log p, is on policy an unbiased estimate of the
  gradient of KL(policy || reference).
- ``k3`` = e^-d - 1 + d. Unbiased, never negative. Its gradient is biased: in expectation it is the gradient of the
  other divergence, KL(reference || policy); the two agree to first order in d.

Source: J. Schulman, "Approximating KL divergence", 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def _k1(difference: torch.Tensor) -> torch.Tensor:
    return difference


def _k2(difference: torch.Tensor) -> torch.Tensor:
    return 0.5 * difference.square()


def _k3(difference: torch.Tensor) -> torch.Tensor:
    return torch.expm1(-difference) + difference


KL_ESTIMATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}
