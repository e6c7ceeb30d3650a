"""avg@k, pass@k and distinct correct answers against enumeration."""

from __future__ import annotations

import itertools
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.core import RLVRError
from megatron_rlvr.evaluation import EvalMetrics, avg_at_k, distinct_correct, evaluate_answers, pass_at_k

PROMPTS = st.lists(st.lists(st.booleans(), min_size=3, max_size=7), min_size=1, max_size=4)


def enumerated_pass_at_k(correct_PK: list[list[bool]], k: int) -> float:
    """The share of k-subsets that hold a right sample, averaged over prompts."""
    return statistics.fmean(
        statistics.fmean(any(subset) for subset in itertools.combinations(correct_K, k)) for correct_K in correct_PK
    )


@given(correct_PK=PROMPTS, k=st.integers(1, 3))
def test_pass_at_k_equals_enumeration(correct_PK: list[list[bool]], k: int) -> None:
    assert pass_at_k(correct_PK, k) == pytest.approx(enumerated_pass_at_k(correct_PK, k), abs=1e-12)


@given(correct_PK=PROMPTS)
def test_avg_at_k_is_the_mean_of_prompt_accuracies(correct_PK: list[list[bool]]) -> None:
    assert avg_at_k(correct_PK) == pytest.approx(statistics.fmean(map(statistics.fmean, correct_PK)), abs=1e-12)


def test_pass_at_k_is_unbiased_not_plugged_in() -> None:
    assert pass_at_k([[True, False, False, False]], 2) == 0.5
    assert pass_at_k([[True] + [False] * 63], 64) == 1.0
    assert pass_at_k([[True] + [False] * 1023], 512) == 0.5


def test_all_metrics_of_a_small_evaluation() -> None:
    metrics = evaluate_answers(
        [[True, True, True, False], [False, False, False, False], [True, True]],
        [["3*8", "4*6", "3*8", "5*5"], ["1", "2", "3", "4"], ["24", "24"]],
        ks=[1, 2],
    )
    assert metrics == EvalMetrics(
        prompts=3,
        samples=10,
        avg_at_k=(0.75 + 0 + 1) / 3,
        pass_at_k={1: (0.75 + 0 + 1) / 3, 2: (1 + 0 + 1) / 3},
        distinct_correct=1.0,
    )
    assert distinct_correct([[True, False], [True, True]], [["a", "b"], ["a", "b"]]) == [1, 2]


def test_too_little_data_is_refused_in_words() -> None:
    with pytest.raises(RLVRError, match="0 prompts"):
        evaluate_answers([], [], [1])
    with pytest.raises(RLVRError, match="prompt 1 has 1 judged samples, too few for pass@2"):
        pass_at_k([[True, False], [True]], 2)
    with pytest.raises(RLVRError, match="prompt 0 has 0 judged samples"):
        avg_at_k([[]])


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="positive k"):
        pass_at_k([[True]], 0)
    with pytest.raises(ValueError, match="zip"):
        distinct_correct([[True]], [["a", "b"]])
    with pytest.raises(ValueError, match="zip"):
        distinct_correct([[True], [True]], [["a"]])
