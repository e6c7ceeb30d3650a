"""Metrics of an evaluation in which every prompt was answered several times.

Prompts weigh the same. They may hold different numbers of samples, since a sample without a verdict is left out, but
each needs at least one, and pass@k at least k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlvr.core import RLVRError


@dataclass(frozen=True, slots=True)
class EvalMetrics:
    """Metrics of one evaluation.

    Attributes:
        prompts: Number of prompts.
        samples: Number of judged samples over all prompts.
        avg_at_k: Expected accuracy of one sample, in [0, 1].
        pass_at_k: For each k, the chance that at least one of k samples is right, in [0, 1].
        distinct_correct: Mean number of different correct answers to a prompt.
    """

    prompts: int
    samples: int
    avg_at_k: float
    pass_at_k: dict[int, float]
    distinct_correct: float


def evaluate_answers(
    correct_PK: Sequence[Sequence[bool]], answers_PK: Sequence[Sequence[str]], ks: Sequence[int]
) -> EvalMetrics:
    """All metrics at once.

    Args:
        correct_PK: For each prompt, whether each sample is right.
        answers_PK: The samples' answer texts in the same order.
        ks: The k of every pass@k wanted.

    Raises:
        RLVRError: If there are no prompts, a prompt has no samples, or fewer than the largest k.
        ValueError: If the two nested lists do not match or a k is not positive.
    """
    return EvalMetrics(
        prompts=len(correct_PK),
        samples=sum(len(correct_K) for correct_K in correct_PK),
        avg_at_k=avg_at_k(correct_PK),
        pass_at_k={k: pass_at_k(correct_PK, k) for k in ks},
        distinct_correct=math.fsum(distinct_correct(correct_PK, answers_PK)) / len(correct_PK),
    )


def avg_at_k(correct_PK: Sequence[Sequence[bool]]) -> float:
    """Mean over prompts of the share of right samples.

    Raises:
        RLVRError: If there are no prompts or a prompt has no samples.
    """
    return pass_at_k(correct_PK, 1)


def pass_at_k(correct_PK: Sequence[Sequence[bool]], k: int) -> float:
    """Mean over prompts of the unbiased pass@k, 1 - C(n - c, k) / C(n, k) for c right of n samples.

    Source: M. Chen et al., arXiv:2107.03374, Eq. 1.

    Raises:
        RLVRError: If there are no prompts or a prompt has fewer than ``k`` samples.
        ValueError: If ``k`` is not positive.
    """
    if k < 1:
        raise ValueError(f"pass@k needs a positive k, got {k}")
    if not correct_PK:
        raise RLVRError("the evaluation holds 0 prompts; check evaluation data and limits")
    for prompt, correct_K in enumerate(correct_PK):
        if len(correct_K) < k:
            raise RLVRError(
                f"prompt {prompt} has {len(correct_K)} judged samples, too few for pass@{k}; draw more samples for "
                "each prompt or ask for a smaller k"
            )
    misses = (math.comb(len(correct_K) - sum(correct_K), k) / math.comb(len(correct_K), k) for correct_K in correct_PK)
    return math.fsum(1.0 - miss for miss in misses) / len(correct_PK)


def distinct_correct(correct_PK: Sequence[Sequence[bool]], answers_PK: Sequence[Sequence[str]]) -> list[int]:
    """Number of different texts among each prompt's right answers; 0 for a prompt without one.

    Texts are compared as they are: spell equal answers equally before counting.

    Raises:
        ValueError: If the two nested lists do not match.
    """
    return [
        len({answer for right, answer in zip(correct_K, answers_K, strict=True) if right})
        for correct_K, answers_K in zip(correct_PK, answers_PK, strict=True)
    ]
