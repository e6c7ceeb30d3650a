"""The signals that a controller may read, each a mean in nats, reduced as sum and count over all ranks first."""

from __future__ import annotations

from typing import Literal

import torch

from megatron_rlvr.core import RLVRError

SignalKind = Literal["rollout", "policy", "sequence", "nucleus"]
"""Which entropy a controller reads:

- ``rollout``: token mean under the policy that made the rollouts, before the updates and whatever their number (H_k).
- ``policy``: token mean over the step's updates, known only after them; a step decides with that of the step before.
- ``sequence``: like ``rollout``, but the mean over rows of each row's token mean, so that long rows weigh no more.
- ``nucleus``: like ``rollout``, but of the renormalised top-p nucleus (for SIREN at the tokens where that is highest).
"""


def mean_entropy(entropy_sum: float, token_count: float) -> float:
    """Token-mean entropy H_k in nats from a sum and a count that already span all ranks and micro-batches.

    Raises:
        RLVRError: If there are no tokens. A step without tokens has no entropy, and a stand-in such as 0 would
            steer the controller.
    """
    if token_count <= 0:
        raise RLVRError(
            f"the entropy signal covers {token_count:g} response tokens, so it has no mean; a step needs at least one "
            "row with a verdict, see the verifier's log and verify.*"
        )
    return entropy_sum / token_count


def sequence_sums(entropy_sum_B: torch.Tensor, token_count_B: torch.Tensor) -> tuple[float, int]:
    """Sum over rows of their token-mean entropy (nats), and how many rows have tokens; ``mean_entropy`` divides them.

    Args:
        entropy_sum_B: Each row's sum of token entropies, over all of its tokens.
        token_count_B: Each row's number of tokens; rows with none are left out.
    """
    counted_B = token_count_B > 0
    means_R = entropy_sum_B[counted_B].double() / token_count_B[counted_B]
    return float(means_R.sum()), int(counted_B.sum())
