"""What a token rule is given and what it gives back.

A rule runs once per rollout batch, before the batch's updates, on the response tokens of all ranks. Whatever it ranks
or averages spans the global batch, so its plan does not depend on ranks, micro-batches or the order of tokens. Most
published code ranks within a micro-batch on one GPU instead, with the policy of the moment; the rules say where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_rlvr.core import RLVRError


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Response tokens of one rollout batch, this rank's share, in any order. Building one is a collective of ``group``.

    Attributes:
        logprob: Log-probability (nats) of each token under the policy that made the batch, as the trainer sees it,
            ``[T]``, floating point and without a gradient, like the next two.
        entropy: Entropy (nats) of that policy at each token.
        advantages: Advantage of each token, already normalised; its sign is decided and no rule changes it.
        row: Global id of the token's response, ``[T]`` int64.
        index: Global index of the token, ``[T]`` int64, unique over all ranks: its identity, whatever the order.
        nucleus_entropy: Entropy of the policy renormalised on its top-p nucleus, ``[T]``, for ``NucleusBonus``.
        group: Ranks that share out the batch; None if these tokens are the whole batch.
        seed: Seed of random choices, the same on all ranks; give each step its own.

    Raises:
        RLVRError: On every rank, if a log-prob, entropy or advantage is NaN or infinite or there are no tokens at all.
        ValueError: If shapes or dtypes do not fit or a tensor carries a gradient.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    advantages: torch.Tensor
    row: torch.Tensor
    index: torch.Tensor
    nucleus_entropy: torch.Tensor | None = None
    group: dist.ProcessGroup | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Compare shapes, then count what is not finite on all ranks together."""
        for name in ("row", "index"):
            if (ids := getattr(self, name)).dtype != torch.int64 or ids.shape != (len(self.logprob),):
                raise ValueError(f"{name} must be int64 of shape [{len(self.logprob)}], got {ids.dtype} {ids.shape}")
        names = ("logprob", "entropy", "advantages", "nucleus_entropy")
        counts = torch.zeros(1 + len(names), dtype=torch.int64, device=self.logprob.device)
        counts[0] = len(self.logprob)
        for place, name in enumerate(names, start=1):
            values = getattr(self, name)
            if values is None:
                continue
            if not values.is_floating_point() or values.shape != self.index.shape or values.requires_grad:
                raise ValueError(f"{name} must hold detached floats of shape {list(self.index.shape)}")
            counts[place] = values.isfinite().logical_not().sum()
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        total, *bad = counts.tolist()
        if total == 0:
            raise RLVRError("the rollout batch has no response tokens to weight; a step needs a row with a verdict")
        for name, count in zip(names, bad, strict=True):
            if count:
                raise RLVRError(
                    f"{name} of {count} of {total} response tokens is NaN or infinite and cannot be ranked; look for "
                    "non-finite logits or rewards"
                )


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """What the updates do with each token, in the order of the ``TokenBatch`` and of its advantages' dtype.

    Attributes:
        advantages: Advantages to train on, ``[T]``, each with its sign as it was, or 0.
        weight: Factor of the token's surrogate, ``[T]``, finite and not negative.
        penalty: Coefficient of abs(log pi - log pi_old), ``[T]``; where it is not 0 the ratio is not clipped. None: 0.
        bonus: Weight of the token in the entropy bonus, ``[T]``, averaging 1 over the batch. None: 1.
    """

    advantages: torch.Tensor
    weight: torch.Tensor
    penalty: torch.Tensor | None = None
    bonus: torch.Tensor | None = None


TokenRule = Callable[[TokenBatch, float], TokenPlan]
"""A rule takes the batch and the controller's gain, which rules of fixed strength ignore."""
