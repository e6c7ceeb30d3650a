"""What the advantage estimators read: verified rows, and the statistics of their groups in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_rlvr.core import RLVRError


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The verified rows of one step, all of them: advantages compare rows, so no rank may hold a part only.

    Attributes:
        rewards_B: Reward of each row, floating.
        groups_B: Group (prompt) of each row, any integers in any order.
        valid_B: False for rows without a verdict, bool. What such a row holds, NaN included, touches no other row.
        lengths_B: Response tokens of each row, integers; the estimators that whiten weigh rows by it.
        mean_logprob_B: Mean log-prob (nats) of each row's tokens under the policy that made it, floating.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """

    rewards_B: torch.Tensor
    groups_B: torch.Tensor
    valid_B: torch.Tensor
    lengths_B: torch.Tensor | None = None
    mean_logprob_B: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Compare shapes before broadcasting can hide a mistake."""
        rewards_B = self.rewards_B
        if rewards_B.ndim != 1 or not rewards_B.dtype.is_floating_point:
            raise ValueError(f"rewards_B must be floating [B], got {rewards_B.dtype} {list(rewards_B.shape)}")
        kinds = {"groups_B": "integers", "valid_B": "bool", "lengths_B": "integers", "mean_logprob_B": "floating"}
        for name, kind in kinds.items():
            value: torch.Tensor | None = getattr(self, name)
            if value is not None and (value.shape != rewards_B.shape or _kind(value.dtype) != kind):
                raise ValueError(f"{name} must be {kind} [B] like rewards_B, got {value.dtype} {list(value.shape)}")

    def need(self, name: str, estimator: str) -> torch.Tensor:
        """The optional tensor ``name``.

        Raises:
            ValueError: If it was not given.
        """
        value: torch.Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"the {estimator} advantages need {name}")
        return value


class Groups(NamedTuple):
    """Valid rows by group, in fp64, so that the order of rows does not show.

    ``index_B`` is the row's place among the distinct groups; ``count_B``, ``mean_B`` and ``flat_B`` are its group's
    number of valid rows, their mean reward, and whether their rewards are all equal. ``deviation_B`` is reward minus
    mean: 0 for rows that are not valid and exactly 0 in flat groups, where rounding of the mean would decide the sign.
    """

    index_B: torch.Tensor
    count_B: torch.Tensor
    mean_B: torch.Tensor
    flat_B: torch.Tensor
    deviation_B: torch.Tensor


def group(outcomes: Outcomes, rewards_B: torch.Tensor | None = None) -> Groups:
    """The statistics of every group, for the rewards of ``outcomes`` or for ``rewards_B`` in their place."""
    valid_B = outcomes.valid_B
    given_B = outcomes.rewards_B if rewards_B is None else rewards_B
    rewards_B = torch.where(valid_B, given_B.detach().double(), 0.0)
    index_B = torch.unique(outcomes.groups_B, return_inverse=True)[1]
    count_B = sum_within(index_B, valid_B.double())
    mean_B = sum_within(index_B, rewards_B) / count_B.clamp(min=1.0)
    lowest, highest = (
        rewards_B.new_zeros(len(index_B)).scatter_reduce(
            0, index_B[valid_B], rewards_B[valid_B], extreme, include_self=False
        )
        for extreme in ("amin", "amax")
    )
    flat_B = (lowest == highest)[index_B]
    deviation_B = torch.where(valid_B, rewards_B - mean_B, 0.0).masked_fill(flat_B, 0.0)
    return Groups(index_B, count_B, mean_B, flat_B, deviation_B)


def sum_within(index_B: torch.Tensor, values_B: torch.Tensor) -> torch.Tensor:
    """For each row, the sum of ``values_B`` over the rows with its index."""
    return values_B.new_zeros(len(values_B)).index_add(0, index_B, values_B)[index_B]


def check_binary(outcomes: Outcomes, estimator: str) -> None:
    """Refuse rewards that do not say right or wrong.

    Raises:
        RLVRError: If a valid row's reward is neither 0 nor 1.
    """
    rewards_B = outcomes.rewards_B[outcomes.valid_B]
    if (other := rewards_B[(rewards_B != 0) & (rewards_B != 1)]).numel():
        raise RLVRError(
            f"the {estimator} advantages count right and wrong answers, but a reward is {float(other[0])}; give "
            "rewards of 0 and 1 or choose another estimator"
        )


def _kind(dtype: torch.dtype) -> str:
    return "bool" if dtype == torch.bool else "floating" if dtype.is_floating_point else "integers"
