r"""Why did the entropy move? First-order predictions from each update, split by cause, against what was observed.

A step of one row's logits along the gradient of ``c log p(y)`` with rate eta changes that row's entropy by
``eta c s``, s the inner product of the gradients of log p(y) and of H (``TokenExtras.entropy_slope``). The *drive* of a
token is ``c s`` with c = -dloss/dlog p of the policy term; that of the bonus is alpha |grad H|^2 (a nucleus' bonus and
the KL terms are left out). The objective sums it by sign of the advantage, for tokens whose gradient the clip removed
as what it would have been, and the loop by the age of the mini-batch. Shares need no eta.

The size of a step in logits is unknown under Adam and shared weights, so the prediction of a change is the drive times
a factor fitted, without intercept, to the steps before it. It assumes that tokens do not share parameters and that the
optimizer is plain gradient descent. Jin et al. (arXiv:2511.05993, appendix E.3) found next to no correlation between
such predictors and AdamW's entropies: this is a diagnostic that reports its own error, not a signal to steer by.

Source: first-order entropy change of a softmax step, arXiv:2602.03392; covariance form, Cui et al., arXiv:2505.22617.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rlvr.core import RLVRError

PREFIX = "entropy_drive/"
_SIGNS = ("positive", "negative")
CAUSES = (*_SIGNS, "bonus")
_SUMS = ("pairs", "drive_squared", "change_squared", "product", "same_sign")


class Attribution:
    """Relates every step's drive to the entropy that the next step finds. The same on every rank."""

    def __init__(self) -> None:
        """Start without a past."""
        self._entropy: float | None = None
        self._drive: float | None = None
        self._sums = dict.fromkeys(_SUMS, 0.0)

    def observe(self, entropy: float) -> dict[str, float]:
        """What the updates of the previous step did to the entropy; call once per step, before its updates.

        Args:
            entropy: H_k of the rollout policy, nats.

        Returns:
            ``entropy_change/observed`` (H_k - H_{k-1}; different prompts, so sampling noise is in it); once a step has
            been seen before it ``entropy_change/predicted`` (from steps before this one) and ``entropy_change/error``
            (predicted - observed); then, over all steps so far, ``entropy_change/correlation`` (uncentred) of drive
            and change and ``entropy_change/sign_agreement``. Empty in the first step.
        """
        record: dict[str, float] = {}
        if self._entropy is not None and self._drive is not None:
            change, sums = entropy - self._entropy, self._sums
            record["entropy_change/observed"] = change
            if sums["drive_squared"] > 0:
                predicted = self._drive * sums["product"] / sums["drive_squared"]
                record |= {"entropy_change/predicted": predicted, "entropy_change/error": predicted - change}
            for name, value in zip(
                _SUMS,
                (1.0, self._drive**2, change**2, self._drive * change, float(self._drive * change > 0)),
                strict=True,
            ):
                sums[name] += value
            record["entropy_change/sign_agreement"] = sums["same_sign"] / sums["pairs"]
            if (scale := (sums["drive_squared"] * sums["change_squared"]) ** 0.5) > 0:
                record["entropy_change/correlation"] = sums["product"] / scale
        self._entropy, self._drive = entropy, None
        return record

    def record(self, means: Mapping[str, float], learning_rate: float = 1.0) -> dict[str, float]:
        """Take the drives of the step's updates from its reduced metrics.

        Args:
            means: Metrics of the step; ``entropy_drive/positive``, ``…/negative`` and ``…/bonus`` are its token means.
            learning_rate: Of the step; the predicted change is proportional to it.

        Returns:
            ``entropy_share/`` of the same three, each a signed share of the sum of the magnitudes, and
            ``entropy_share/age_n``, the same over the mini-batches; ``entropy_share/withheld``, what clipping held
            back of both signs relative to that sum.
        """
        self._drive = learning_rate * sum(means[PREFIX + cause] for cause in CAUSES)
        ages = [name for name in means if name.startswith(PREFIX + "age_")]
        whole = sum(abs(means[PREFIX + cause]) for cause in CAUSES)
        aged = sum(abs(means[name]) for name in ages)
        withheld = sum(means[f"{PREFIX}withheld_{sign}"] for sign in _SIGNS)
        shares = {f"entropy_share/{cause}": _share(means[PREFIX + cause], whole) for cause in CAUSES}
        shares["entropy_share/withheld"] = _share(withheld, whole)
        return shares | {f"entropy_share/{name.removeprefix(PREFIX)}": _share(means[name], aged) for name in ages}

    def state_dict(self) -> dict[str, float | None]:
        """Everything a resumed run needs, as JSON values."""
        return {"entropy": self._entropy, "drive": self._drive, **self._sums}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Continue from ``state``.

        Raises:
            RLVRError: If something is missing.
        """
        if missing := self.state_dict().keys() - state.keys():
            raise RLVRError(
                f"the checkpoint's attribution state lacks {', '.join(sorted(missing))}; resume from a checkpoint of "
                "this version"
            )
        self._entropy, self._drive = state["entropy"], state["drive"]
        self._sums = {name: float(state[name] or 0.0) for name in _SUMS}


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
