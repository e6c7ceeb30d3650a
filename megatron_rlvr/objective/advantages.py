"""From rewards to advantages, one number for each response. `ESTIMATORS` has them by name.

Every estimator takes the `Outcomes` of a whole step and returns advantages ``[B]`` in the dtype of the rewards,
without gradient and independent of the order of rows. Rows that are not valid give exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megatron_rlvr.core import RLVRError
from megatron_rlvr.objective.outcomes import Outcomes, check_binary, group, sum_within

# They refuse rewards other than 0 and 1.
BINARY = frozenset(("pass_at_k", "asym_grpo"))
EPSILON = 1e-6
WHITEN_EPSILON = 1e-8


def grpo(outcomes: Outcomes) -> torch.Tensor:
    """``(R - mean) / (std + 1e-6)`` within each group, over its valid rows.

    The paper writes std(R_1 .. R_G) without saying which; this is the unbiased one (divided by n - 1), as in verl's
    GRPO. A group whose valid rewards are all equal, a single one included, gives exactly 0.

    Source: GRPO, arXiv:2402.03300, section 4.1.
    """
    return _grpo(outcomes, outcomes.rewards_B)


def dr_grpo(outcomes: Outcomes) -> torch.Tensor:
    """``R - mean`` within each group, not divided by its spread. Source: Dr. GRPO, arXiv:2503.20783."""
    return group(outcomes).deviation_B.to(outcomes.rewards_B.dtype)


def rloo(outcomes: Outcomes) -> torch.Tensor:
    """Reward minus the mean of the group's other valid rows; a row without others gives 0. Source: arXiv:2402.14740."""
    groups = group(outcomes)
    others_B = (groups.count_B - 1.0).clamp(min=1.0)
    return (groups.deviation_B * groups.count_B / others_B).to(outcomes.rewards_B.dtype)


def reinforce_pp(outcomes: Outcomes) -> torch.Tensor:
    """Rewards whitened over all tokens of the batch, without regard to groups; needs ``lengths_B``.

    A row weighs as many times as it has tokens, which is what whitening token advantages does (slime, OpenRLHF).

    Source: REINFORCE++, arXiv:2501.03262.
    """
    return whiten(outcomes.rewards_B, _tokens(outcomes, "reinforce_pp"))


def reinforce_pp_baseline(outcomes: Outcomes) -> torch.Tensor:
    """``R - mean`` within each group, then whitened over all tokens of the batch; needs ``lengths_B``.

    The token mean that whitening takes off is not 0 where right and wrong answers differ in length, so a group of equal
    rewards may end up beside 0 by that shift, as in slime.

    Source: REINFORCE++, arXiv:2501.03262, section 3.2.
    """
    deviation_B = group(outcomes).deviation_B
    return whiten(deviation_B, _tokens(outcomes, "reinforce_pp_baseline")).to(outcomes.rewards_B.dtype)


def pass_at_k(outcomes: Outcomes, *, k: int) -> torch.Tensor:
    """Each response's mean advantage over the k-subsets it belongs to, a subset's reward being its best.

    With n valid rows, w of them wrong, and F = C(w, k) / C(n, k), the share of subsets without a right answer,

        A(right) = sqrt(F / (1 - F)),    A(wrong) = -A(right) (n - w) / w

    A group in which every subset has the same reward gives 0, and so does one of fewer than k valid rows.

    Raises:
        RLVRError: If ``k`` is below 1 or a valid reward is neither 0 nor 1.

    Source: Pass@k Training, arXiv:2508.10751 (its analytical form, without the 1e-6 of its code).
    """
    if k < 1:
        raise RLVRError(f"pass_at_k has k={k}; give a k of at least 1 and at most the number of samples per prompt")
    check_binary(outcomes, "pass_at_k")
    groups = group(outcomes)
    right_B = torch.where(outcomes.valid_B, outcomes.rewards_B.double(), 0.0)
    rights_B = sum_within(groups.index_B, right_B)
    wrongs_B = groups.count_B - rights_B
    failing_B = torch.ones_like(right_B)
    for drawn in range(k):
        failing_B = failing_B * (wrongs_B - drawn).clamp(min=0.0) / (groups.count_B - drawn).clamp(min=1.0)
    gain_B = (failing_B / (1.0 - failing_B)).sqrt()
    advantages_B = torch.where(right_B == 1.0, gain_B, -gain_B * rights_B / wrongs_B)
    varied_B = outcomes.valid_B & (failing_B > 0.0) & (rights_B > 0.0)
    return torch.where(varied_B, advantages_B, 0.0).to(outcomes.rewards_B.dtype)


def unlikeliness(outcomes: Outcomes, *, beta: float = 0.25) -> torch.Tensor:
    """GRPO of ``R (1 - beta rank / G)``: a right answer earns less the likelier it is; needs ``mean_logprob_B``.

    ``rank`` counts the group's valid rows of smaller mean log-prob (the least likely has 0, equal ones share), and G
    its valid rows. Groups of right answers only keep the differences between them.

    Raises:
        RLVRError: If ``beta`` is not in [0, 1].

    Source: arXiv:2506.02355, section 4, and the order of operations in its code.
    """
    if not 0.0 <= beta <= 1.0:
        raise RLVRError(f"unlikeliness has beta={beta}; give one between 0 (plain GRPO) and 1")
    logprob_B = outcomes.need("mean_logprob_B", "unlikeliness").detach()
    groups = group(outcomes)
    place_B = torch.unique(torch.where(outcomes.valid_B, logprob_B, 0.0), return_inverse=True)[1]
    first_B = groups.index_B * len(place_B)
    sorted_keys = (first_B + place_B)[outcomes.valid_B].sort().values
    rank_B = torch.searchsorted(sorted_keys, first_B + place_B) - torch.searchsorted(sorted_keys, first_B)
    share_B = rank_B / groups.count_B.clamp(min=1.0)
    return _grpo(outcomes, outcomes.rewards_B.double() * (1.0 - beta * share_B))


def outcome(outcomes: Outcomes) -> torch.Tensor:
    """1 for a reward above 0.5, else -1, whatever the group.

    With the loss's sign weights it is W-REINFORCE (positive weight 0.1), negative-sample reinforcement (0), or
    positive-sample reinforcement (negative weight 0).

    Source: arXiv:2506.01347.
    """
    signs_B = torch.where(outcomes.rewards_B.detach() > 0.5, 1.0, -1.0)
    return torch.where(outcomes.valid_B, signs_B, 0.0).to(outcomes.rewards_B.dtype)


def asym_grpo(outcomes: Outcomes, *, b_plus: float = 0.5, b_minus: float = 0.5) -> torch.Tensor:
    """``((1 - p) / p)^b_plus`` for right and ``-(p / (1 - p))^b_minus`` for wrong answers, p the group's accuracy.

    Exponents of 0.5 are GRPO with the population's standard deviation, exponents of 0 plain REINFORCE with +-1.

    Raises:
        RLVRError: If an exponent is negative or infinite, or a valid reward is neither 0 nor 1.

    Source: AsymGRPO, arXiv:2604.04894, as a secondary source prints it.
    """
    if not (0.0 <= b_plus < math.inf and 0.0 <= b_minus < math.inf):
        raise RLVRError(f"asym_grpo has b_plus={b_plus} and b_minus={b_minus}; give exponents that are not negative")
    check_binary(outcomes, "asym_grpo")
    p_B = group(outcomes).mean_B
    right_B = outcomes.rewards_B == 1
    odds_B = torch.where(right_B, (1.0 - p_B) / p_B, p_B / (1.0 - p_B))
    advantages_B = torch.where(right_B, odds_B.pow(b_plus), -odds_B.pow(b_minus))
    return torch.where(outcomes.valid_B, advantages_B, 0.0).to(outcomes.rewards_B.dtype)


ESTIMATORS: dict[str, Callable[..., torch.Tensor]] = {
    estimator.__name__: estimator
    for estimator in (
        *(grpo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline),
        *(pass_at_k, unlikeliness, outcome, asym_grpo),
    )
}


def grpo_advantages(rewards_B: torch.Tensor, groups_B: torch.Tensor, valid_B: torch.Tensor) -> torch.Tensor:
    """`grpo` of three tensors; see `Outcomes` for them."""
    return grpo(Outcomes(rewards_B, groups_B, valid_B))


def whiten(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``(x - mean) / sqrt(var + 1e-8)`` over the global batch, a value counting ``weights`` times.

    The variance is the unbiased one of that many tokens (divided by their number minus 1), as in slime. Where all
    values that count are equal the result is exactly 0, and so it is where the weight is 0.

    Args:
        values: Advantages or rewards, any shape, floating; identical on every rank.
        weights: Tokens behind each, such as a response's length, or a mask; not negative, of the same shape.

    Returns:
        The whitened values, of their shape and dtype, without gradient.
    """
    counted = weights > 0
    weights = torch.where(counted, weights.double(), 0.0)
    wide = torch.where(counted, values.detach().double(), 0.0)
    total = weights.sum()
    centred = torch.where(counted, wide - (weights * wide).sum() / total, 0.0)
    variance = (weights * centred.square()).sum() / (total - 1.0 if total >= 2.0 else total)
    present = wide[counted]
    if present.numel() == 0 or bool((present == present[0]).all()):
        return torch.zeros_like(values)
    return (centred * (variance + WHITEN_EPSILON).rsqrt()).to(values.dtype)


def _grpo(outcomes: Outcomes, rewards_B: torch.Tensor) -> torch.Tensor:
    groups = group(outcomes, rewards_B)
    squares_B = sum_within(groups.index_B, groups.deviation_B.square())
    std_B = (squares_B / (groups.count_B - 1.0).clamp(min=1.0)).sqrt()
    return (groups.deviation_B / (std_B + EPSILON)).to(outcomes.rewards_B.dtype)


def _tokens(outcomes: Outcomes, estimator: str) -> torch.Tensor:
    return torch.where(outcomes.valid_B, outcomes.need("lengths_B", estimator), 0)
