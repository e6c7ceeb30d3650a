r"""The surrogates: what multiplies a token's weighted advantage in the loss.

For a token with advantage A, weight w >= 0 and ratio r = exp(log p - old log p) the loss is ``-w A g``, where g, the
gain, depends on the sign of A but not on its size. Weighting a side is therefore the same as scaling its advantages,
under every surrogate. With sg for stop-gradient:

    ppo     min(r, 1 + high) for A > 0;  min(max(r, 1 - low), dual) for A < 0
    gspo    as ppo, with the sequence's ratio s = exp(mean of log r) in place of r: sg(s) p / sg(p)
    cispo   sg(clip(r, 1 - low, 1 + high)) log p
    gppo    as ppo, but a clipped token keeps the gradient of beta (1 -+ width) r / sg(r)
    none    log p, which is REINFORCE: the gradient is A grad log p, the value is no objective

Sources: PPO, arXiv:1707.06347; dual clip, arXiv:1912.09729; separate widths, DAPO, arXiv:2503.14476; GSPO and its
token form, arXiv:2507.18071; CISPO, arXiv:2506.13585; GPPO, arXiv:2508.07629, with coefficients, CE-GPPO,
arXiv:2509.20712; sequence masks, DeepSeek-V3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_rlvr.objective.inputs import LossInputs, sequence_mean
from megatron_rlvr.objective.settings import LossSettings


class Gain(NamedTuple):
    """The gain of each token.

    ``value`` is differentiable. ``rate`` is its derivative in the token's log-prob, without gradient, as it would be if
    nothing were withheld; ``withheld`` says where clipping makes it 0.
    """

    value: torch.Tensor
    rate: torch.Tensor
    withheld: torch.Tensor


def log_ratios(inputs: LossInputs, settings: LossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-ratio of each token, and the one that the surrogate clips: its own or, under ``gspo``, its sequence's."""
    # Masking before the difference keeps NaN and inf of masked-out tokens away from the gradient as well.
    logprob = torch.where(inputs.mask, inputs.logprob, 0.0)
    log_ratio = logprob - inputs.fixed("old_logprob")
    if settings.surrogate != "gspo":
        return log_ratio, log_ratio
    mean = sequence_mean(log_ratio.detach(), inputs.need("sequence", "surrogate gspo"), inputs.mask)
    return log_ratio, mean + _zero_with_gradient(logprob)


def opsm_drops(inputs: LossInputs, settings: LossSettings, log_ratio: torch.Tensor) -> torch.Tensor:
    """True at tokens of negative advantage in sequences that the policy has moved away from too far."""
    gap = -sequence_mean(log_ratio.detach(), inputs.need("sequence", "a finite opsm"), inputs.mask)
    return inputs.mask & (inputs.advantages < 0) & (gap > settings.opsm)


def gain(log_ratio: torch.Tensor, logprob: torch.Tensor, positive: torch.Tensor, settings: LossSettings) -> Gain:
    """The surrogate's gain; tokens that take no part should come with a log-ratio and a log-prob of 0."""
    return _SURROGATES[settings.surrogate](log_ratio, logprob, positive, settings)


def _zero_with_gradient(logprob: torch.Tensor) -> torch.Tensor:
    """0, with the gradient of ``logprob``; an impossible token, whose ratio is 0, has none."""
    return torch.where(logprob == -torch.inf, 0.0, logprob - logprob.detach())


def _ppo(log_ratio: torch.Tensor, logprob: torch.Tensor, positive: torch.Tensor, settings: LossSettings) -> Gain:
    low, high = settings.log_clip
    # Clipping the logarithm keeps a ratio that overflows out of the loss wherever it is clipped.
    clipped = torch.where(positive, log_ratio.clamp(max=high), log_ratio.clamp(low, math.log(settings.dual_clip)))
    return Gain(clipped.exp(), log_ratio.detach().exp(), (clipped != log_ratio).detach())


def _cispo(log_ratio: torch.Tensor, logprob: torch.Tensor, positive: torch.Tensor, settings: LossSettings) -> Gain:
    bounded = log_ratio.detach().clamp(*settings.log_clip).exp()
    return Gain(bounded * logprob, bounded, torch.zeros_like(positive))


def _gppo(log_ratio: torch.Tensor, logprob: torch.Tensor, positive: torch.Tensor, settings: LossSettings) -> Gain:
    low, high = settings.log_clip
    fixed = log_ratio.detach()
    kept = torch.where(positive & (fixed > high), settings.gppo_high, 1.0)
    kept = torch.where(~positive & (fixed < low), settings.gppo_low, kept)
    rate = kept * torch.where(positive, fixed.clamp(max=high), fixed.clamp(min=low)).exp()
    return Gain(rate * _zero_with_gradient(log_ratio).exp(), rate, torch.zeros_like(positive))


def _none(log_ratio: torch.Tensor, logprob: torch.Tensor, positive: torch.Tensor, settings: LossSettings) -> Gain:
    return Gain(logprob, torch.ones_like(logprob), torch.zeros_like(positive))


_SURROGATES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, LossSettings], Gain]] = {
    "ppo": _ppo,
    "gspo": _ppo,
    "cispo": _cispo,
    "gppo": _gppo,
    "none": _none,
}
