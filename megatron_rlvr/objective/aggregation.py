"""How the tokens of a global mini-batch are averaged: factors that make every average a sum over a token count."""

from __future__ import annotations

import math

import torch

from megatron_rlvr.core import RLVRError

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


def token_scale(mask_BL: torch.Tensor, how: str, constant: float | None = None) -> torch.Tensor:
    """The factor of each token's loss, such that the sum over the global token count is the average wanted.

    With N masked-in tokens and S rows that have any, a row of n of them gets

        token_mean      1                     every token of the mini-batch counts alike (DAPO, arXiv:2503.14476)
        sequence_mean   N / (S n)             every response counts alike (GRPO, arXiv:2402.03300; GSPO)
        constant        N / (S constant)      a token counts alike in every mini-batch (Dr. GRPO, arXiv:2503.20783)

    The factors come from the whole global mini-batch, so they stay the same however it is cut into micro-batches.

    Args:
        mask_BL: True at the tokens that take part, bool ``[B, L]``; the global mini-batch, identical on every rank.
        how: One of `AGGREGATIONS`.
        constant: Length in tokens that ``constant`` divides by, such as the longest response allowed.

    Returns:
        Factors ``[B, L]``, fp32, 0 where masked out.

    Raises:
        RLVRError: If ``how`` is not known, or ``constant`` is missing, not positive, or given for another average.
    """
    if how not in AGGREGATIONS:
        raise RLVRError(f"aggregation is {how!r}; choose one of {', '.join(AGGREGATIONS)}")
    if (how == "constant") != (constant is not None) or (constant is not None and not 0.0 < constant < math.inf):
        raise RLVRError(f"aggregation {how} has constant={constant}; give a positive length with 'constant' alone")
    lengths_B = mask_BL.sum(dim=1).double()
    per_row = lengths_B.sum() / (lengths_B > 0).sum().clamp(min=1)
    if how == "token_mean":
        scale_B = torch.ones_like(lengths_B)
    elif constant is None:
        scale_B = per_row / lengths_B.clamp(min=1.0)
    else:
        scale_B = (per_row / constant).expand_as(lengths_B)
    return torch.where(mask_BL, scale_B[:, None], 0.0).float()
