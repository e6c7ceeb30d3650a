"""Token rules that choose tokens: to leave out, to hold back with a penalty or to give the entropy bonus to.

All ignore the controller's gain. A share of tokens is ``portion(share, n)``: rounded down, but at least one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy.selection import (
    global_count,
    global_mean,
    global_sum,
    largest,
    portion,
    uniform,
)
from megatron_rlvr.entropy.tokens import TokenBatch, TokenPlan


@dataclass(frozen=True, slots=True)
class Uniform:
    """Advantages as they are and weight 1 for every token: plain policy gradient."""

    def __call__(self, batch: TokenBatch, gain: float) -> TokenPlan:
        """See the class."""
        return TokenPlan(batch.advantages, torch.ones_like(batch.advantages))


@dataclass(frozen=True, slots=True)
class ClipCov:
    """Clip-Cov, arXiv:2505.22617: a few tokens that drive entropy change take no part in the update.

    With cov = (A - mean A) (log p - mean log p), means over all tokens, weight 0 goes to a random choice among tokens
    with ``low`` < cov < ``high``: max(1, floor(share N)) of them, N being the number of all tokens, as in verl.

    The original takes cov from the policy of the moment and chooses anew in every micro-batch on every GPU, where "at
    least one" makes the share grow with the number of micro-batches. It also passes over tokens that PPO's clip already
    silences, of which there are none before the first update. Its scripts clip ratios at 1 +- 1.

    Attributes:
        share: Share of all tokens to silence.
        low: Bound that cov must exceed.
        high: Bound that cov must stay below.
    """

    share: float = 2e-4
    low: float = 1.0
    high: float = 5.0

    def __call__(self, batch: TokenBatch, gain: float) -> TokenPlan:
        """See the class."""
        covariance = _covariance(batch)
        eligible = (covariance > self.low) & (covariance < self.high)
        return TokenPlan(batch.advantages, _without_random(batch, self.share, eligible))


@dataclass(frozen=True, slots=True)
class KlCov:
    """KL-Cov, arXiv:2505.22617: the tokens that drive entropy change most are held near the old policy.

    The max(1, floor(share N)) tokens of largest cov (see ``ClipCov``) get the loss
    -A r + coefficient abs(log p - log p_old) with their ratio r unclipped.

    The penalty has no gradient at the first update of a batch, so with one update per batch the rule only frees those
    tokens of a clip that would not bind. The original chooses anew in every micro-batch on every GPU, and its released
    code clips no token's ratio at all, which clip widths of 1 below and inf above give.

    Attributes:
        share: Share of all tokens to penalise.
        coefficient: Strength of the penalty.
    """

    share: float = 2e-4
    coefficient: float = 1.0

    def __call__(self, batch: TokenBatch, gain: float) -> TokenPlan:
        """See the class."""
        count = portion(self.share, _total(batch))
        chosen = largest(_covariance(batch), batch.index, count, group=batch.group)
        return TokenPlan(
            batch.advantages, torch.ones_like(batch.advantages), penalty=self.coefficient * chosen.to(batch.advantages)
        )


@dataclass(frozen=True, slots=True)
class TopEntropy:
    """Forking tokens or "80/20", arXiv:2506.01939: weight 1 for the tokens of highest entropy, 0 for the others.

    The loss still divides by the number of all tokens, as the paper's objective does. Most code takes a quantile of
    each micro-batch; here the threshold is that of the global batch, and of tokens at the threshold those of lower
    index are taken, so the share is exact even where many entropies are 0.

    Attributes:
        share: Share of all tokens to train on.
    """

    share: float = 0.2

    def __call__(self, batch: TokenBatch, gain: float) -> TokenPlan:
        """See the class."""
        return TokenPlan(batch.advantages, _top(batch, batch.entropy, self.share).to(batch.advantages))


@dataclass(frozen=True, slots=True)
class RandomPositives:
    """Rand-Pos-Clip, the control of arXiv:2511.05993: random tokens with A > 0 take no part in the update.

    The share is of all tokens, so that with equal shares it silences as many tokens as ``ClipCov`` would, given that
    many positive tokens; the paper says "the same proportion" and no more.

    Attributes:
        share: Share of all tokens to silence.
    """

    share: float = 2e-4

    def __call__(self, batch: TokenBatch, gain: float) -> TokenPlan:
        """See the class."""
        return TokenPlan(batch.advantages, _without_random(batch, self.share, batch.advantages > 0))


@dataclass(frozen=True, slots=True)
class NucleusBonus:
    """SIREN, arXiv:2509.25133: the entropy bonus goes to the tokens of highest nucleus entropy only.

    Of N tokens the n = portion(share, N) highest weigh N / n in the bonus and the others 0, so that the bonus averaged
    over all tokens is the mean over the chosen ones. SIREN's loss c (M - anchor)^2, with M that mean, has the gradient
    2 c (M - anchor) dM: a bonus whose coefficient -2 c (M - anchor) is a proportional controller's, to be driven by
    ``masked_nucleus_entropy``.

    The original chooses and averages within a micro-batch, with the policy of the moment.

    Attributes:
        share: Share of all tokens that get the bonus; the original masks 0.8.
    """

    share: float = 0.2

    def __call__(self, batch: TokenBatch, gain: float) -> TokenPlan:
        """See the class; raises ``RLVRError`` if the batch has no nucleus entropy."""
        chosen = _top(batch, _nucleus_entropy(batch), self.share)
        scale = _total(batch) / max(global_count(chosen, batch.group), 1)
        return TokenPlan(batch.advantages, torch.ones_like(batch.advantages), bonus=scale * chosen.to(batch.advantages))


def masked_nucleus_entropy(batch: TokenBatch, share: float = 0.2) -> float:
    """Mean nucleus entropy (nats) of the ``share`` of tokens where it is highest, over all ranks: SIREN's signal M.

    Raises:
        RLVRError: If the batch has no nucleus entropy or the share is not in (0, 1].
    """
    if share <= 0:
        raise RLVRError(f"the share of tokens to average nucleus entropy over is {share} but must lie in (0, 1]")
    values = _nucleus_entropy(batch)
    chosen = _top(batch, values, share)
    return global_sum(values[chosen], batch.group) / global_count(chosen, batch.group)


def _total(batch: TokenBatch) -> int:
    return global_count(torch.ones_like(batch.index, dtype=torch.bool), batch.group)


def _top(batch: TokenBatch, values: torch.Tensor, share: float) -> torch.Tensor:
    return largest(values, batch.index, portion(share, _total(batch)), group=batch.group)


def _covariance(batch: TokenBatch) -> torch.Tensor:
    """Each token's term of the covariance of advantage and log-prob, fp64."""
    advantages, logprob = batch.advantages.double(), batch.logprob.double()
    return (advantages - global_mean(advantages, batch.group)) * (logprob - global_mean(logprob, batch.group))


def _without_random(batch: TokenBatch, share: float, eligible: torch.Tensor) -> torch.Tensor:
    """Weight 0 for a random choice of eligible tokens, as many as the share of all tokens is, and 1 elsewhere."""
    count = portion(share, _total(batch))
    dropped = largest(uniform(batch.index, batch.seed), batch.index, count, among_T=eligible, group=batch.group)
    return dropped.logical_not().to(batch.advantages)


def _nucleus_entropy(batch: TokenBatch) -> torch.Tensor:
    if batch.nucleus_entropy is None:
        raise RLVRError(
            "nucleus_entropy of the rollout batch is None but the SIREN rule ranks tokens by it; compute token "
            "statistics with nucleus=0.8"
        )
    return batch.nucleus_entropy
