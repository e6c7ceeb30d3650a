"""Every surrogate: weights by sign, textbook forms, kept and withheld gradients, sequence ratios."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import SURROGATES, gradient, loss_and_gradient, replaced, tokens

from megatron_rlvr.objective import LossInputs, LossSettings, policy_loss, token_scale

SEEDS = st.integers(0, 10**6)
EVERY = pytest.mark.parametrize("name", SURROGATES)


@EVERY
@given(seed=SEEDS, weight=st.floats(0.0, 2.0))
def test_weighting_equals_scaling_positive_advantages(name: str, seed: int, weight: float) -> None:
    inputs, settings = tokens(seed), SURROGATES[name]
    advantages = inputs.advantages
    scaled = replaced(inputs, advantages=torch.where(advantages > 0, weight * advantages, advantages))
    weighted, weighted_gradient = loss_and_gradient(inputs, replace(settings, positive_weight=weight))
    plain, plain_gradient = loss_and_gradient(scaled, settings)
    assert torch.equal(weighted.losses, plain.losses)
    assert torch.equal(weighted_gradient, plain_gradient)


@EVERY
@given(seed=SEEDS)
def test_the_weights_zero_leave_one_side(name: str, seed: int) -> None:
    inputs, settings = tokens(seed), SURROGATES[name]
    whole, whole_gradient = loss_and_gradient(inputs, settings)
    for off, side in (("positive_weight", inputs.advantages < 0), ("negative_weight", inputs.advantages > 0)):
        outputs, one_gradient = loss_and_gradient(inputs, replace(settings, **{off: 0.0}))
        assert torch.equal(one_gradient, torch.where(side, whole_gradient, 0.0)), off
        torch.testing.assert_close(outputs.losses, torch.where(side, whole.losses, 0.0))
        assert int(outputs.count) == int(inputs.mask.sum())


def textbook(name: str, settings: LossSettings, inputs: LossInputs) -> torch.Tensor:
    """Loss of each token as the papers print it."""
    low, high = 1.0 - settings.clip_low, 1.0 + settings.clip_high
    a, new = inputs.advantages, inputs.logprob
    r = (new - inputs.old_logprob).exp()
    if name in ("ppo", "dual"):
        loss = -torch.minimum(r * a, r.clamp(low, high) * a)
        return torch.where(a < 0, torch.minimum(loss, -settings.dual_clip * a), loss) if name == "dual" else loss
    if name == "cispo":
        return -r.clamp(low, high).detach() * a * new
    if name == "gppo":
        kept = r / r.detach()
        loss = torch.where((a < 0) & (r < low), -settings.gppo_low * low * kept * a, -r * a)
        return torch.where((a > 0) & (r > high), -settings.gppo_high * high * kept * a, loss)
    return -a * new


@pytest.mark.parametrize("name", [name for name in SURROGATES if name != "gspo"])
@given(seed=SEEDS)
def test_equals_the_textbook(name: str, seed: int) -> None:
    inputs = tokens(seed, masked=0.0)
    expected = textbook(name, SURROGATES[name], inputs)
    outputs, got = loss_and_gradient(inputs, SURROGATES[name])
    torch.testing.assert_close(outputs.losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), inputs.logprob)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ppo", "dual", "none"])
def test_gradient_equals_finite_differences(name: str) -> None:
    inputs = tokens(5, masked=0.3)
    of = lambda logprob: policy_loss(replaced_leaf(inputs, logprob), SURROGATES[name]).loss_sum  # noqa: E731
    assert torch.autograd.gradcheck(of, (inputs.logprob,), eps=1e-7, atol=1e-6)


def replaced_leaf(inputs: LossInputs, logprob: torch.Tensor) -> LossInputs:
    return LossInputs(
        logprob, inputs.old_logprob, inputs.advantages, inputs.entropy, inputs.mask, sequence=inputs.sequence
    )


@pytest.mark.parametrize("name", ["cispo", "gppo"])
def test_gradient_equals_finite_differences_with_the_coefficient_held(name: str) -> None:
    """The coefficient is a stop-gradient: hold it at the point and differentiate what is left by differences."""
    inputs, settings = tokens(6), SURROGATES[name]
    outputs, got = loss_and_gradient(inputs, settings)
    at = inputs.logprob.detach()
    for place in range(len(at)):
        rate = got[place]
        step = torch.zeros_like(at)
        step[place] = 1e-6
        if name == "cispo":  # linear in log p: the loss is rate times log p
            expected = outputs.losses[place].detach() / at[place] if inputs.mask[place] else 0.0
        else:  # the loss is its value times p / sg(p)
            expected = outputs.losses[place].detach() * (step[place].exp() - (-step[place]).exp()) / 2e-6
        torch.testing.assert_close(rate, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def sequence_objective(inputs: LossInputs, logprob: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """GSPO as its paper prints it: a mean over responses of the clipped sequence ratio."""
    terms = []
    for index in inputs.sequence[inputs.mask].unique():
        mine = inputs.mask & (inputs.sequence == index)
        a = inputs.advantages[mine][0]
        s = (logprob[mine] - inputs.old_logprob[mine]).mean().exp()
        loss = -torch.minimum(s * a, s.clamp(1 - settings.clip_low, 1 + settings.clip_high) * a)
        terms.append(torch.minimum(loss, -settings.dual_clip * a) if a < 0 else loss)
    return torch.stack(terms).mean()


@given(seed=SEEDS)
def test_gspo_token_gradient_equals_the_sequence_objective(seed: int) -> None:
    inputs, settings = tokens(seed, size=25), SURROGATES["gspo"]
    mask_BL = inputs.mask.view(5, 5)
    if not mask_BL.any():
        return
    scaled = replaced(inputs, scale=token_scale(mask_BL, "sequence_mean").flatten().double())
    outputs, got = loss_and_gradient(scaled, settings)
    truth = sequence_objective(inputs, inputs.logprob, settings)
    torch.testing.assert_close(outputs.loss_sum / outputs.count, truth, rtol=1e-6, atol=1e-7)
    expected = torch.autograd.grad(truth, inputs.logprob)[0]
    torch.testing.assert_close(got / outputs.count, expected, rtol=1e-6, atol=1e-7)


def test_the_sequence_objective_equals_finite_differences() -> None:
    inputs = tokens(8)
    of = lambda logprob: sequence_objective(inputs, logprob, SURROGATES["gspo"])  # noqa: E731
    assert torch.autograd.gradcheck(of, (inputs.logprob,), eps=1e-7, atol=1e-6)


def test_gspo_sequences_may_have_any_ids_and_places() -> None:
    inputs = tokens(4)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved = LossInputs(
        **{n: getattr(inputs, n)[order] for n in ("logprob", "old_logprob", "advantages", "entropy", "mask")},
        sequence=10**12 - 7 * inputs.sequence[order],
    )
    base = policy_loss(inputs, SURROGATES["gspo"]).losses
    torch.testing.assert_close(policy_loss(moved, SURROGATES["gspo"]).losses, base[order], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@EVERY
def test_ratios_that_overflow_or_vanish(name: str, advantage: float) -> None:
    """Whatever is clipped or has no weight stays finite; a token of ratio 0 does not spoil its neighbours."""
    old = torch.full((3,), -1.0, dtype=torch.float64)
    weight = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    inputs = LossInputs(
        logprob=torch.tensor([2000.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True),
        old_logprob=old,
        advantages=torch.full_like(old, advantage),
        entropy=torch.zeros_like(old),
        mask=torch.ones(3, dtype=torch.bool),
        weight=weight,
        sequence=torch.arange(3),
    )
    outputs, got = loss_and_gradient(inputs, SURROGATES[name])
    assert outputs.losses.isfinite().all()
    assert got.tolist() == pytest.approx([0.0, -advantage, -advantage])
    impossible = replaced(inputs, logprob=torch.tensor([-math.inf, -1.0, -1.0], dtype=torch.float64))
    assert gradient(policy_loss(impossible, SURROGATES[name]), impossible.logprob).isfinite().all()


def test_which_surrogates_may_be_cut_anywhere() -> None:
    assert {name: settings.separable for name, settings in SURROGATES.items()} == {
        name: name != "gspo" for name in SURROGATES
    }
    assert not LossSettings(opsm=0.1).separable
