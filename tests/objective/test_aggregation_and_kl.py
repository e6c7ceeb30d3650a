"""Averages that no micro-batch can change, and divergence estimates against exact enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.core import RLVRError
from megatron_rlvr.objective import AGGREGATIONS, token_scale
from megatron_rlvr.objective.kl import KL_ESTIMATORS


def average(losses_BL: torch.Tensor, mask_BL: torch.Tensor, how: str) -> float:
    """The definition, over rows that have tokens."""
    rows = [loss_L[mask_L].double() for loss_L, mask_L in zip(losses_BL, mask_BL, strict=True) if mask_L.any()]
    if how == "token_mean":
        return float(torch.cat(rows).mean())
    if how == "sequence_mean":
        return float(torch.stack([row.mean() for row in rows]).mean())
    return float(torch.stack([row.sum() / 7.0 for row in rows]).mean())


@pytest.mark.parametrize("how", AGGREGATIONS)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 6), max_size=3))
def test_any_split_gives_the_same_average(how: str, seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses_BL = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask_BL = torch.rand(6, 5, generator=generator) < torch.rand(6, 1, generator=generator)
    if not mask_BL.any():
        return
    scale_BL = token_scale(mask_BL, how, 7.0 if how == "constant" else None)
    assert scale_BL.dtype == torch.float32
    assert not scale_BL[~mask_BL].any()
    sizes = [b - a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 6], strict=True)]
    parts = zip(scale_BL.split(sizes), losses_BL.split(sizes), strict=True)
    total = sum(float((scale_BL * loss_BL).sum()) for scale_BL, loss_BL in parts)
    assert total / int(mask_BL.sum()) == pytest.approx(average(losses_BL, mask_BL, how), rel=1e-6, abs=1e-6)


def test_no_tokens_have_no_scale() -> None:
    for how in AGGREGATIONS:
        scale_BL = token_scale(torch.zeros(2, 3, dtype=torch.bool), how, 5.0 if how == "constant" else None)
        assert scale_BL.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("how", "constant", "words"),
    [
        ("mean", None, "aggregation is 'mean'; choose one of token_mean, "),
        ("constant", None, "aggregation constant has constant=None"),
        ("constant", 0.0, "aggregation constant has constant=0"),
        ("constant", math.nan, "aggregation constant has constant=nan"),
        ("token_mean", 5.0, r"aggregation token_mean has constant=5\.0"),
    ],
)
def test_bad_averages_are_refused(how: str, constant: float | None, words: str) -> None:
    with pytest.raises(RLVRError, match=words):
        token_scale(torch.ones(1, 1, dtype=torch.bool), how, constant)


def enumerated(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expected value and gradient of an estimate under the policy, and the policy's and reference's logits."""
    generator = torch.Generator().manual_seed(3)
    logits, reference = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    estimates = KL_ESTIMATORS[name](logits.log_softmax(0) - reference.log_softmax(0))
    weights = logits.detach().softmax(0)
    (grad,) = torch.autograd.grad((weights * estimates).sum(), logits)
    return (weights * estimates).sum().detach(), grad, logits, reference


def divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.softmax(0) * (a.log_softmax(0) - b.log_softmax(0))).sum()


def test_expected_values_and_gradients_of_the_estimates() -> None:
    for name, unbiased in (("k1", True), ("k2", False), ("k3", True)):
        value, _, logits, reference = enumerated(name)
        assert math.isclose(float(value), float(divergence(logits, reference).detach()), rel_tol=1e-12) == unbiased, (
            name
        )
    _, grad, logits, reference = enumerated("k1")
    torch.testing.assert_close(grad, torch.zeros(6, dtype=torch.float64), atol=1e-15, rtol=0.0)
    for name, truth in (("k2", divergence(logits, reference)), ("k3", divergence(reference, logits))):
        _, grad, other, _ = enumerated(name)
        assert torch.equal(other, logits)
        torch.testing.assert_close(grad, torch.autograd.grad(truth, logits)[0], rtol=1e-12, atol=1e-14)


def test_k3_keeps_small_divergences_in_fp32() -> None:
    assert float(KL_ESTIMATORS["k3"](torch.tensor(1e-3))) == pytest.approx(0.5e-6, rel=1e-3)
