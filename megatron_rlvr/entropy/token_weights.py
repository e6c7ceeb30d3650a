"""Token rules that weight tokens or shape their advantages, most of them by a controller's gain.

Results are computed in fp64 and returned in the dtype of the batch's advantages. A share of tokens is
``portion(share, n)``: rounded down, but at least one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy.selection import global_count, global_max, largest, largest_per_row, portion
from megatron_rlvr.entropy.tokens import TokenBatch, TokenPlan


@dataclass(frozen=True, slots=True)
class ConfidentSigns:
    """EntroPIC, arXiv:2511.15248: a gain a in [-1, 1] shifts weight between the signs on confident tokens.

    Where p > ``threshold``: weight 1 + a if A > 0 and 1 - a if A < 0. All other tokens weigh 1. Entropy above its
    target gives a > 0, which makes confident tokens more so.

    The original adds a r abs(A) to the objective without a clip, with p of the policy of the moment and a gain of its
    own in every micro-batch; here the clipped surrogate is weighted and the gain is one for the step.

    Attributes:
        threshold: Probability above which a token is confident.
    """

    threshold: float = 0.95

    def __post_init__(self) -> None:
        """Refuse what is no probability that a token can exceed."""
        if not 0.0 < self.threshold < 1.0:
            raise RLVRError(
                f"the threshold of EntroPIC's token rule is {self.threshold} but must lie in (0, 1); the original's is "
                "0.95"
            )

    def __call__(self, batch: TokenBatch, gain: float) -> TokenPlan:
        """See the class; raises ``RLVRError`` if the gain is out of range."""
        _require_gain("EntroPIC's token rule", gain, -1.0, 1.0)
        confident = batch.logprob.double() > math.log(self.threshold)
        weight = torch.where(confident, 1.0 + gain * batch.advantages.double().sign(), 1.0)
        return TokenPlan(batch.advantages, weight.to(batch.advantages))


@dataclass(frozen=True, slots=True)
class Surprisal:
    """STARE, arXiv:2606.19236: a gain g favours surprising tokens.

    Of the tokens with A > 0, the ``share`` of highest surprisal -log p weigh 1 + g; with ``both_signs`` the same share
    of the tokens with A < 0 weighs 1 - g. All other tokens weigh 1. The paper's weight 1.1 is g = 0.1 while the
    entropy is below its target and 0 otherwise.

    The original takes quantiles of each micro-batch, tokens at the quantile included.

    Attributes:
        share: Share of the tokens of a sign.
        both_signs: Whether to weaken surprising tokens with A < 0 as well, the paper's variant C2.
    """

    share: float = 0.1
    both_signs: bool = False

    def __call__(self, batch: TokenBatch, gain: float) -> TokenPlan:
        """See the class; raises ``RLVRError`` if the gain is out of range."""
        _require_gain("STARE's token rule", gain, -1.0, 1.0 if self.both_signs else math.inf)
        weight = torch.ones_like(batch.advantages)
        weight[self._surprising(batch, batch.advantages > 0)] = 1.0 + gain
        if self.both_signs:
            weight[self._surprising(batch, batch.advantages < 0)] = 1.0 - gain
        return TokenPlan(batch.advantages, weight)

    def _surprising(self, batch: TokenBatch, among: torch.Tensor) -> torch.Tensor:
        count = portion(self.share, global_count(among, batch.group))
        return largest(-batch.logprob, batch.index, count, among_T=among, group=batch.group)


@dataclass(frozen=True, slots=True)
class EntropyAdvantage:
    """Entropy-shaped advantage, arXiv:2506.14758: A + min(alpha H, abs(A) / kappa). Ignores the gain.

    The second term is 0 where A is, and at most abs(A), so no sign changes. The original takes H from the policy of the
    moment, as a constant; here it is that of the policy that made the batch.

    Attributes:
        alpha: Scale of the entropy; the paper has 0.4 with GRPO and 0.1 with PPO.
        kappa: Bound on the shift, at least 1.
    """

    alpha: float = 0.4
    kappa: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what could change signs."""
        if not self.kappa >= 1.0 or not 0.0 <= self.alpha < math.inf:
            raise RLVRError(
                f"kappa {self.kappa} must be at least 1 and alpha {self.alpha} finite and not negative, or the "
                "entropy-shaped advantage could change its sign; the paper uses 2 and 0.4"
            )

    def __call__(self, batch: TokenBatch, gain: float) -> TokenPlan:
        """See the class."""
        advantages = batch.advantages.double()
        # Rounding leaves entropies a little below 0, which would push an advantage of 0 below it as well.
        shift = torch.minimum(self.alpha * batch.entropy.double().clamp(min=0.0), advantages.abs() / self.kappa)
        return TokenPlan((advantages + shift).to(batch.advantages), torch.ones_like(batch.advantages))


@dataclass(frozen=True, slots=True)
class LowProbPositives:
    """A3PO, arXiv:2512.21625: a gain f >= 1 multiplies the advantages that widen the policy, row by row.

    In each row the ``share`` of lowest probability among tokens with A > 0, and the ``share`` of highest probability
    among tokens with A < 0, have A times f. With an advantage per response, as in GRPO, a row has one sign. The paper
    lets f fall from 2 to 1 over the first 200 steps; its released code keeps it constant, takes the row's sign from the
    answer being right or wrong, and ranks per row as here.

    Assumes that every row lies whole on one rank.

    Attributes:
        share: Share of each row's tokens.
    """

    share: float = 0.2

    def __call__(self, batch: TokenBatch, gain: float) -> TokenPlan:
        """See the class; raises ``RLVRError`` if the gain is out of range."""
        _require_gain("A3PO's token rule", gain, 1.0, math.inf)
        positive, negative = batch.advantages > 0, batch.advantages < 0
        ids = (batch.index, batch.row, self.share)
        chosen = largest_per_row(-batch.logprob, *ids, among_T=positive)
        chosen |= largest_per_row(batch.logprob, *ids, among_T=negative)
        advantages = batch.advantages.double()
        shaped = torch.where(chosen, gain * advantages, advantages)
        return TokenPlan(shaped.to(batch.advantages), torch.ones_like(batch.advantages))


@dataclass(frozen=True, slots=True)
class Steer:
    """STEER, arXiv:2510.10150: the more a token would change entropy, the less it weighs. Ignores the gain.

    The estimated change is Omega = abs(A / p_old p (1 - p) (ln p + H)). Before the first update p = p_old, which leaves
    abs(A) (1 - p) abs(ln p + H). With its extremes over the global batch the weight is, by ``form``,

        exponential   exp(-k Omega) in [weight_min, 1],    k = -ln(weight_min) / max(Omega_max, omega_floor)
        linear        from weight_max at Omega_min down to weight_min at Omega_max, half-way if those are equal

    The original takes p and H from the policy of the moment and the extremes from each micro-batch, and holds p above
    1e-8 before it divides.

    Attributes:
        form: Which of the two; the released code's default is linear.
        weight_min: Smallest weight, in (0, 1].
        weight_max: Largest weight of the linear form.
        omega_floor: Keeps a batch of small changes from being weakened as much as one of large changes; positive.
    """

    form: Literal["exponential", "linear"] = "exponential"
    weight_min: float = 0.8
    weight_max: float = 1.2
    omega_floor: float = 0.02

    def __post_init__(self) -> None:
        """Refuse what has no logarithm or quotient."""
        if self.form not in ("exponential", "linear"):
            raise RLVRError(f"the form of STEER's weights is {self.form!r}; use 'exponential' or 'linear'")
        if not 0.0 < self.weight_min <= 1.0 <= self.weight_max < math.inf or not self.omega_floor > 0.0:
            raise RLVRError(
                f"STEER needs 0 < weight_min <= 1 <= weight_max and a positive omega_floor, not {self.weight_min}, "
                f"{self.weight_max} and {self.omega_floor}; the released code uses 0.8, 1.2 and 0.02"
            )

    def __call__(self, batch: TokenBatch, gain: float) -> TokenPlan:
        """See the class."""
        logprob = batch.logprob.double()
        # expm1 keeps 1 - p exact where p is nearly 1, which is where most tokens are.
        omega = (batch.advantages.double() * logprob.expm1() * (logprob + batch.entropy.double())).abs()
        highest = global_max(omega, batch.group)
        if self.form == "exponential":
            decay = -math.log(self.weight_min) / max(highest, self.omega_floor)
            weight = (-decay * omega).exp().clamp(self.weight_min, 1.0)
        else:
            lowest = -global_max(-omega, batch.group)
            place = (omega - lowest) / (highest - lowest) if highest > lowest else torch.full_like(omega, 0.5)
            weight = self.weight_max - place * (self.weight_max - self.weight_min)
        return TokenPlan(batch.advantages, weight.to(batch.advantages))


@dataclass(frozen=True, slots=True)
class LogProbAdvantage:
    """REPO-R, arXiv:2603.11682: a gain zeta >= 0 rewards unlikely tokens more and blames them less.

    Where A > 0 the advantage becomes A (1 - zeta log p), where A < 0 it becomes A (1 + zeta log p), the factor held at
    0 or above so that no sign changes. The paper doubles or halves zeta as entropy is below or above its start.
    """

    def __call__(self, batch: TokenBatch, gain: float) -> TokenPlan:
        """See the class; raises ``RLVRError`` if the gain is out of range."""
        _require_gain("REPO-R's token rule", gain, 0.0, math.inf)
        advantages = batch.advantages.double()
        factor = (1.0 - gain * advantages.sign() * batch.logprob.double()).clamp(min=0.0)
        return TokenPlan((advantages * factor).to(batch.advantages), torch.ones_like(batch.advantages))


def _require_gain(whose: str, gain: float, low: float, high: float) -> None:
    if not low <= gain <= high or math.isinf(gain):
        raise RLVRError(f"the gain of {whose} is {gain} but lies in [{low:g}, {high:g}]; bound the controller to that")
