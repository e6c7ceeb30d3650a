"""The settings of the policy loss, and the combinations that contradict themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlvr.core import RLVRError
from megatron_rlvr.objective.kl import KL_ESTIMATORS

SURROGATE_NAMES = ("ppo", "gspo", "cispo", "gppo", "none")
# Estimators whose advantage is positive for right and negative for wrong answers by definition.
_SIGN_IS_VERDICT = ("outcome", "asym_grpo")


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What the policy loss computes; building one checks it.

    Attributes:
        surrogate: One of ``ppo``, ``gspo``, ``cispo``, ``gppo``, ``none``; see `megatron_rlvr.objective.surrogates`.
        clip_low: Width of the clip below ratio 1, in [0, 1]; 1 never clips.
        clip_high: Width of the clip above ratio 1, not negative; ``inf`` never clips.
        dual_clip: Largest ratio of tokens with A < 0 under ``ppo`` and ``gspo``, at least 1; ``inf`` never clips.
        gppo_low: Gradient that ``gppo`` keeps of tokens clipped from below, not negative.
        gppo_high: The same of tokens clipped from above.
        positive_weight: Weight lambda of tokens with A > 0, finite and not negative.
        negative_weight: Weight of tokens with A < 0, finite and not negative.
        bonus: Coefficient alpha of the entropy bonus, finite; negative lowers entropy.
        kl: Coefficient of the divergence from the reference policy, finite and not negative.
        kl_estimator: ``k1``, ``k2`` or ``k3``; see `megatron_rlvr.objective.kl` for their gradients.
        opsm: A sequence of negative advantage is dropped while its mean of old minus current log-prob (nats) is above
            this; ``inf`` drops none.

    Raises:
        RLVRError: If a value is out of range or has no effect under the surrogate.
    """

    surrogate: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = math.inf
    gppo_low: float = 0.5
    gppo_high: float = 1.0
    positive_weight: float = 1.0
    negative_weight: float = 1.0
    bonus: float = 0.0
    kl: float = 0.0
    kl_estimator: str = "k3"
    opsm: float = math.inf

    def __post_init__(self) -> None:
        """Check every value by itself."""
        if self.surrogate not in SURROGATE_NAMES:
            raise RLVRError(f"surrogate is {self.surrogate!r}; choose one of {', '.join(SURROGATE_NAMES)}")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise RLVRError(f"kl_estimator is {self.kl_estimator!r}; choose one of {', '.join(KL_ESTIMATORS)}")
        if not 0.0 <= self.clip_low <= 1.0 or not self.clip_high >= 0.0:
            raise RLVRError(
                f"clip_low {self.clip_low} must lie in [0, 1] and clip_high {self.clip_high} must not be negative"
            )
        for name in ("positive_weight", "negative_weight", "gppo_low", "gppo_high", "kl"):
            if not 0.0 <= (value := getattr(self, name)) < math.inf:
                raise RLVRError(f"{name} is {value} but a loss weight is finite and not negative")
        if not math.isfinite(self.bonus):
            raise RLVRError(f"bonus is {self.bonus} but the entropy bonus needs a finite coefficient")
        if not self.dual_clip >= 1.0:
            raise RLVRError(f"dual_clip is {self.dual_clip} but it bounds a ratio from above; give at least 1")
        if self.dual_clip < math.inf and self.surrogate not in ("ppo", "gspo"):
            raise RLVRError(
                f"dual_clip is {self.dual_clip} but surrogate {self.surrogate} has none; set surrogate to ppo or gspo"
            )
        if not self.opsm >= 0.0:
            raise RLVRError(f"opsm is {self.opsm} but a divergence is not negative; give at least 0, inf for none")

    @property
    def separable(self) -> bool:
        """Whether each token's loss depends on that token alone, so that a batch may be cut anywhere."""
        return self.surrogate != "gspo" and self.opsm == math.inf

    @property
    def log_clip(self) -> tuple[float, float]:
        """The clip bounds of the log-ratio."""
        return math.log1p(-self.clip_low) if self.clip_low < 1.0 else -math.inf, math.log1p(self.clip_high)


def check_composition(
    settings: LossSettings, *, estimator: str, whiten: bool, token_advantages: bool, penalty: bool, updates: int
) -> None:
    """Refuse combinations in which one part undoes another; each part by itself is sound.

    GSPO with another average than the sequence mean is not among them: it weighs responses by length and stays exact.

    Args:
        settings: Of the loss.
        estimator: Name of the advantage estimator.
        whiten: Whether its advantages are whitened afterwards.
        token_advantages: Whether a token rule gives the tokens of one response different advantages.
        penalty: Whether a token rule asks for KL-Cov's penalty.
        updates: Optimizer updates per rollout batch, mini-batches times epochs.

    Raises:
        RLVRError: If two parts contradict each other.
    """
    if whiten and estimator in _SIGN_IS_VERDICT:
        raise RLVRError(
            f"whitening moves the sign of the {estimator} advantages, which means right or wrong; switch it off"
        )
    if settings.surrogate == "gspo" and token_advantages:
        raise RLVRError(
            "surrogate gspo has one ratio and one advantage for a response, but the entropy recipe shapes advantages "
            "token by token; set surrogate to ppo or choose another recipe"
        )
    if penalty and settings.surrogate != "ppo":
        raise RLVRError(f"the KL-Cov penalty belongs to surrogate ppo, not {settings.surrogate}; set surrogate to ppo")
    if penalty and updates == 1:
        raise RLVRError(
            "the KL-Cov penalty is 0 on the first update after a rollout, which is the only one; raise minibatches or "
            "epochs"
        )
