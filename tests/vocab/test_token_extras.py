"""The further statistics: against definitions in float64, finite differences, and where one token is certain."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.vocab import TokenExtras, linear_token_stats, token_stats

NAMES = TokenExtras.__slots__


def definitions(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> dict[str, torch.Tensor]:
    """Every quantity from its definition; gradients by autograd, one row at a time."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    for row, target in zip(logits.double(), targets, strict=True):
        scaled = (row / temperature).requires_grad_()
        logp = scaled.log_softmax(dim=-1)
        p = logp.exp()
        entropy = -(p * logp).sum()
        (grad_logp,) = torch.autograd.grad(logp[target], scaled, retain_graph=True)
        (grad_entropy,) = torch.autograd.grad(entropy, scaled)
        values = (
            p.max(),
            p.square().sum(),
            (p * (logp + entropy).square()).sum(),
            grad_logp.norm(),
            grad_entropy.norm(),
            grad_logp @ grad_entropy,
        )
        for name, value in zip(NAMES, values, strict=True):
            found[name].append(value.detach())
    return {name: torch.stack(values) for name, values in found.items()}


@given(
    vocab=st.integers(1, 30),
    scale=st.sampled_from([0.0, 0.5, 3.0, 12.0]),
    temperature=st.floats(0.3, 3.0),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=50, deadline=None)
def test_equal_to_their_definitions(vocab: int, scale: float, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(4, vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (4,), generator=generator)
    got = token_stats(logits, targets, temperature=temperature, extras=True).extras
    for name, truth in definitions(logits, targets, temperature).items():
        # Norms are roots, whose absolute error is the root of rounding where the truth is 0.
        atol = 1e-7 if name.endswith("norm") else 1e-13
        torch.testing.assert_close(getattr(got, name), truth, rtol=1e-9, atol=atol, msg=name)


@pytest.mark.parametrize("gap", [8.0, 14.0, 20.0])
def test_keep_their_digits_where_a_token_is_almost_certain(gap: float) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    logits[:, 7] += gap
    targets = torch.tensor([7, 7, 7, 7, 3, 4])
    got = token_stats(logits, targets, extras=True).extras
    exact = token_stats(logits.double(), targets, extras=True).extras
    for name in NAMES:
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=3e-6, atol=0.0, msg=name)
    textbook = (1.0 - 2.0 * logits.softmax(-1)[:, 7] + logits.softmax(-1).square().sum(-1))[:4].clamp(min=0).sqrt()
    assert exact is not None
    if gap >= 14.0:
        assert ((textbook.double() / exact.logprob_grad_norm[:4]) - 1.0).abs().max() > 1e-2


def test_entropy_slope_predicts_the_change_of_entropy() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 2.0 * torch.randn(8, 12, generator=generator, dtype=torch.float64)
    targets = torch.randint(12, (8,), generator=generator)
    before = token_stats(logits, targets, extras=True)
    eta, advantage = 1e-6, 1.7
    step = torch.nn.functional.one_hot(targets, 12) - logits.softmax(-1)
    after = token_stats(logits + eta * advantage * step, targets)
    assert before.extras is not None
    torch.testing.assert_close(
        (after.entropy - before.entropy) / eta, advantage * before.extras.entropy_slope, rtol=1e-4, atol=1e-6
    )


def test_nasty_rows() -> None:
    inf = math.inf
    rows = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [5.0, -inf, -inf, -inf], [1.0, 1.0, -inf, -inf], [0.0, 0.0, -inf, 0.0], [-inf] * 4]
    )
    extras = token_stats(rows, torch.tensor([1, 0, 1, 2, 0]), extras=True).extras
    assert extras is not None
    assert extras.max_prob[:4].tolist() == pytest.approx([0.25, 1.0, 0.5, 1 / 3])
    assert extras.collision[:4].tolist() == pytest.approx([0.25, 1.0, 0.5, 1 / 3])
    assert extras.varentropy[:4].tolist() == pytest.approx([0.0] * 4)
    assert extras.logprob_grad_norm.tolist() == pytest.approx([math.sqrt(0.75), 0.0, math.sqrt(0.5), 0.0, 0.0])
    assert extras.entropy_slope.tolist() == pytest.approx([0.0] * 5, abs=1e-7)


def test_are_absent_unless_asked_for_and_carry_no_gradient() -> None:
    logits, targets = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    assert token_stats(logits, targets).extras is None
    extras = token_stats(logits, targets, extras=True).extras
    assert extras is not None
    assert not any(getattr(extras, name).requires_grad for name in NAMES)
    linear = linear_token_stats(logits.detach(), torch.eye(5), targets, extras=True).extras
    for name in NAMES:
        torch.testing.assert_close(getattr(linear, name), getattr(extras, name))
