"""Advantages of GRPO: a reward measured against the other responses to the same prompt."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def grpo_advantages(rewards_B: torch.Tensor, groups_B: torch.Tensor, valid_B: torch.Tensor) -> torch.Tensor:
    """``(R - mean) / (std + 1e-6)`` within each group, over its valid rows.

    The paper writes std(R_1 .. R_G) without saying which; this is the unbiased one (divided by n - 1), as in verl's
    GRPO. A group whose valid rewards are all equal, a single one included, gives exactly 0, because a rounding error
    in its mean would decide the sign. Rows that are not valid give exactly 0 and touch no other row, whatever their
    reward holds. Sums run in fp64, so that the order of rows does not show.

    Args:
        rewards_B: Reward of each row, floating.
        groups_B: Group of each row, any integers in any order.
        valid_B: False for rows without a verdict, bool.

    Returns:
        Advantages ``[B]`` in the dtype of ``rewards_B``, without gradient.

    Raises:
        ValueError: If shapes or dtypes do not fit.

    Source: GRPO, arXiv:2402.03300, section 4.1.
    """
    if rewards_B.ndim != 1 or not rewards_B.dtype.is_floating_point:
        raise ValueError(f"rewards_B must be floating [B], got {rewards_B.dtype} {list(rewards_B.shape)}")
    if groups_B.shape != rewards_B.shape or groups_B.dtype.is_floating_point:
        raise ValueError(f"groups_B must be integers [B] like rewards_B, got {groups_B.dtype} {list(groups_B.shape)}")
    if valid_B.shape != rewards_B.shape or valid_B.dtype != torch.bool:
        raise ValueError(f"valid_B must be bool [B] like rewards_B, got {valid_B.dtype} {list(valid_B.shape)}")
    groups, index_B = torch.unique(groups_B, return_inverse=True)
    rewards = torch.where(valid_B, rewards_B.detach().double(), 0.0)
    zeros = rewards.new_zeros(groups.numel())
    counts = zeros.index_add(0, index_B, valid_B.double())
    means = zeros.index_add(0, index_B, rewards) / counts.clamp(min=1.0)
    deviations_B = torch.where(valid_B, rewards - means[index_B], 0.0)
    stds = (zeros.index_add(0, index_B, deviations_B.square()) / (counts - 1.0).clamp(min=1.0)).sqrt()
    lowest, highest = (
        zeros.scatter_reduce(0, index_B[valid_B], rewards[valid_B], extreme, include_self=False)
        for extreme in ("amin", "amax")
    )
    flat = lowest == highest
    advantages_B = (deviations_B / (stds[index_B] + EPSILON)).masked_fill(flat[index_B], 0.0)
    return advantages_B.to(rewards_B.dtype)
