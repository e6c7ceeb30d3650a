"""The signal a controller reads: token-mean entropy of the policy that made the rollouts."""

from __future__ import annotations

from megatron_rlvr.core import RLVRError


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
