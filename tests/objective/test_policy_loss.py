"""The clipped, sign-weighted surrogate: hand-computed values, PAR's identities, clip corners, masks and splits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.core import RLVRError
from megatron_rlvr.objective import LossInputs, LossOutputs, LossSettings, policy_loss

INF = math.inf
GARBAGE = [math.nan, INF, -INF, 1e38]


def make(
    ratio: list[float], advantage: list[float], mask: list[bool] | None = None, entropy: list[float] | None = None
) -> LossInputs:
    """Tokens with the given ratios, from old log-probs of -1."""
    logprob = torch.tensor(ratio, dtype=torch.float64).log() - 1.0
    return LossInputs(
        logprob=logprob.requires_grad_(),
        old_logprob=torch.full_like(logprob, -1.0),
        advantages=torch.tensor(advantage, dtype=torch.float64),
        entropy=torch.tensor(entropy or [0.0] * len(ratio), dtype=torch.float64),
        mask=torch.tensor(mask or [True] * len(ratio)),
    )


def random_inputs(seed: int, shape: tuple[int, ...] = (4, 9), masked: float = 0.3) -> LossInputs:
    """Tokens with ratios well outside the clip, advantages of all three signs and some tokens masked out."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -noise().abs()
    advantages = noise() * (torch.rand(shape, generator=generator) > 0.2)
    return LossInputs(
        logprob=(old + 0.4 * noise()).requires_grad_(),
        old_logprob=old,
        advantages=advantages,
        entropy=noise().abs(),
        mask=torch.rand(shape, generator=generator) >= masked,
    )


def loss(inputs: LossInputs, low: float = 0.2, high: float = 0.28, weight: float = 1.0) -> LossOutputs:
    """The loss with DAPO's clip widths."""
    return policy_loss(inputs, LossSettings(clip_low=low, clip_high=high, positive_weight=weight))


def gradient(outputs: LossOutputs, inputs: LossInputs) -> torch.Tensor:
    """Gradient of the summed loss in the log-probs."""
    return torch.autograd.grad(outputs.loss_sum, inputs.logprob)[0]


def textbook_ppo(inputs: LossInputs, low: float, high: float) -> torch.Tensor:
    """PPO as its paper prints it, one token at a time over the mask."""
    terms = []
    for new, old, advantage in zip(
        inputs.logprob[inputs.mask], inputs.old_logprob[inputs.mask], inputs.advantages[inputs.mask], strict=True
    ):
        ratio = torch.exp(new - old)
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage))
    return torch.stack(terms).sum()


def changed(inputs: LossInputs, **fields: torch.Tensor) -> LossInputs:
    """A copy with some fields replaced and a log-prob leaf of its own."""
    names = ("logprob", "old_logprob", "advantages", "entropy", "mask")
    values = {name: fields.get(name, getattr(inputs, name)).detach().clone() for name in names}
    values["logprob"].requires_grad_()
    return LossInputs(**values)


def test_hand_computed_par() -> None:
    #                   A>0 free  A>0 clipped  A<0 free  A<0 clipped  A=0  masked out
    inputs = make(
        ratio=[1.1, 1.5, 1.5, 0.5, 0.9, 3.0],
        advantage=[2.0, 2.0, -1.0, -1.0, 0.0, 5.0],
        mask=[True, True, True, True, True, False],
        entropy=[0.1, 0.2, 0.3, 0.4, 0.5, 9.0],
    )
    got = loss(inputs, weight=0.5)
    assert got.loss_sum.item() == pytest.approx(-(0.5 * 2 * 1.1) - 0.5 * 2 * 1.28 + 1.5 + 0.8, rel=1e-12)
    assert int(got.count) == 5
    torch.testing.assert_close(gradient(got, inputs), torch.tensor([-1.1, 0, 1.5, 0, 0, 0]).double(), atol=1e-7, rtol=0)
    sums = {name: float(total) for name, (total, _) in got.metrics.items()}
    assert sums == pytest.approx(
        {
            "clip_fraction_high": 1.0,
            "clip_fraction_low": 1.0,
            "approx_kl": sum(r - 1 - math.log(r) for r in (1.1, 1.5, 1.5, 0.5, 0.9)),
            "ratio": 1.1 + 1.5 + 1.5 + 0.5 + 0.9,
            "policy_entropy": 1.5,
            "positive_fraction": 2.0,
            "negative_fraction": 2.0,
        },
        rel=1e-12,
    )
    assert {int(count) for _, count in got.metrics.values()} == {5}
    assert not any(total.requires_grad for total, _ in got.metrics.values())


@given(seed=st.integers(0, 10**6), low=st.floats(0.0, 1.0), high=st.floats(0.0, 2.0))
@settings(max_examples=40, deadline=None)
def test_weight_one_is_textbook_ppo(seed: int, low: float, high: float) -> None:
    inputs = random_inputs(seed, masked=0.1)
    got, truth = loss(inputs, low, high), textbook_ppo(inputs, low, high)
    torch.testing.assert_close(got.loss_sum, truth, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(truth, inputs.logprob)
    torch.testing.assert_close(gradient(got, inputs), grad, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 10**6), weight=st.floats(0.0, 2.0))
@settings(max_examples=40, deadline=None)
def test_weighting_equals_scaling_positive_advantages(seed: int, weight: float) -> None:
    inputs = random_inputs(seed)
    scaled = changed(
        inputs, advantages=torch.where(inputs.advantages > 0, weight * inputs.advantages, inputs.advantages)
    )
    weighted, plain = loss(inputs, weight=weight), loss(scaled)
    assert torch.equal(weighted.loss_sum, plain.loss_sum)
    assert torch.equal(gradient(weighted, inputs), gradient(plain, scaled))
    assert weighted.count == plain.count


def test_weight_zero_leaves_non_positive_tokens_alone_but_counts_all() -> None:
    inputs = random_inputs(3)
    got = loss(inputs, weight=0.0)
    negatives = changed(inputs, mask=inputs.mask & (inputs.advantages <= 0))
    only = loss(negatives)
    torch.testing.assert_close(got.loss_sum, only.loss_sum)
    assert torch.equal(gradient(got, inputs), gradient(only, negatives))
    assert int(got.count) == int(inputs.mask.sum()) > int(only.count)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        pytest.param(1.0, 1.0, -1.0, id="on-policy"),
        pytest.param(1.27, 1.0, -1.27, id="just-inside-high"),
        pytest.param(1.29, 1.0, 0.0, id="just-outside-high"),
        pytest.param(0.1, 1.0, -0.1, id="positive-is-not-clipped-low"),
        pytest.param(0.81, -1.0, 0.81, id="just-inside-low"),
        pytest.param(0.79, -1.0, 0.0, id="just-outside-low"),
        pytest.param(9.0, -1.0, 9.0, id="negative-is-not-clipped-high"),
        pytest.param(9.0, 0.0, 0.0, id="no-advantage"),
    ],
)
def test_clip_corners(ratio: float, advantage: float, slope: float) -> None:
    inputs = make([ratio], [advantage])
    assert gradient(loss(inputs), inputs).item() == pytest.approx(slope, abs=1e-12)


def test_widths_that_never_clip() -> None:
    inputs = make([50.0, 1e-6], [1.0, -1.0])
    got = loss(inputs, low=1.0, high=INF)
    torch.testing.assert_close(gradient(got, inputs), torch.tensor([-50.0, 1e-6]).double())
    assert float(got.metrics["clip_fraction_high"][0]) == float(got.metrics["clip_fraction_low"][0]) == 0.0


@pytest.mark.parametrize(("advantage", "weight", "high"), [(1.0, 1.0, 0.28), (0.0, 1.0, 0.28), (1.0, 0.0, INF)])
def test_an_overflowing_ratio_without_a_part_in_the_loss_stays_out(
    advantage: float, weight: float, high: float
) -> None:
    inputs = changed(make([1.0, 1.0], [advantage, -1.0]), logprob=torch.tensor([2000.0, -1.0], dtype=torch.float64))
    got = loss(inputs, high=high, weight=weight)
    assert got.loss_sum.isfinite()
    assert gradient(got, inputs).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("field", ["logprob", "old_logprob", "advantages", "entropy"])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_out_garbage_reaches_nothing(field: str, garbage: float) -> None:
    clean = random_inputs(11)
    dirty = changed(clean, **{field: getattr(clean, field).masked_fill(~clean.mask, garbage)})
    got, base = loss(dirty, weight=0.3), loss(clean, weight=0.3)
    assert torch.equal(got.loss_sum, base.loss_sum)
    assert torch.equal(gradient(got, dirty), gradient(base, clean))
    for name, (total, count) in base.metrics.items():
        assert torch.equal(got.metrics[name][0], total), name
        assert torch.equal(got.metrics[name][1], count), name


def test_masked_in_garbage_is_not_hidden() -> None:
    for field in ("logprob", "old_logprob", "advantages"):
        inputs = make([1.0, 1.0], [1.0, -1.0])
        poisoned = changed(inputs, **{field: torch.tensor([1.0, math.nan], dtype=torch.float64)})
        assert loss(poisoned).loss_sum.isnan(), field


@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 36), max_size=5))
@settings(max_examples=30, deadline=None)
def test_micro_batches_add_up(seed: int, cuts: list[int]) -> None:
    whole = random_inputs(seed, (36,))
    total = loss(whole, weight=0.4)
    bounds = [0, *sorted(cuts), 36]
    parts = []
    for start, end in itertools.pairwise(bounds):
        names = ("logprob", "old_logprob", "advantages", "entropy", "mask")
        parts.append(loss(LossInputs(**{name: getattr(whole, name)[start:end] for name in names}), weight=0.4))
    loss_sum = torch.stack([part.loss_sum for part in parts]).sum()
    torch.testing.assert_close(loss_sum, total.loss_sum, rtol=1e-12, atol=1e-12)
    assert sum(int(part.count) for part in parts) == int(total.count)
    torch.testing.assert_close(
        torch.autograd.grad(loss_sum, whole.logprob)[0], gradient(total, whole), rtol=1e-12, atol=0.0
    )
    for name, (value, count) in total.metrics.items():
        assert sum(float(part.metrics[name][0]) for part in parts) == pytest.approx(float(value), rel=1e-12, abs=1e-12)
        assert sum(int(part.metrics[name][1]) for part in parts) == int(count)


def test_gradient_equals_finite_differences() -> None:
    inputs = random_inputs(5)

    def of(logprob: torch.Tensor) -> torch.Tensor:
        fields = (inputs.old_logprob, inputs.advantages, inputs.entropy, inputs.mask)
        return loss(LossInputs(logprob, *fields), weight=0.6).loss_sum

    assert torch.autograd.gradcheck(of, (inputs.logprob,), eps=1e-7, atol=1e-6)


def test_only_the_log_probs_receive_a_gradient() -> None:
    leaves = [torch.full((3,), -1.0).requires_grad_() for _ in range(4)]
    new, old, advantages, entropy = leaves
    outputs = loss(LossInputs(new, old, advantages, entropy, torch.ones(3, dtype=torch.bool)))
    torch.autograd.backward(outputs.loss_sum)
    assert [leaf.grad is not None for leaf in leaves] == [True, False, False, False]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (5,)])
def test_no_tokens_give_a_zero_that_still_has_a_gradient(shape: tuple[int, ...]) -> None:
    inputs = random_inputs(1, shape, masked=1.1)
    outputs = loss(inputs)
    assert outputs.loss_sum.item() == 0.0
    assert int(outputs.count) == 0
    assert not gradient(outputs, inputs).any()


def test_approx_kl_keeps_small_divergences_in_fp32() -> None:
    step = torch.full((64,), 1e-5)
    inputs = LossInputs(step, torch.zeros(64), torch.ones(64), torch.zeros(64), torch.ones(64, dtype=torch.bool))
    assert float(loss(inputs).metrics["approx_kl"][0]) == pytest.approx(64 * 0.5e-10, rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [{"low": -0.1}, {"low": 1.1}, {"high": -0.1}, {"high": math.nan}, {"weight": -1.0}, {"weight": math.nan}],
)
def test_bad_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(RLVRError, match=r"(clip_low|positive_weight) "):
        loss(make([1.0], [1.0]), **change)


def test_misuse_is_refused() -> None:
    inputs = make([1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="advantages has shape"):
        changed(inputs, advantages=torch.ones(2, 1))
    with pytest.raises(ValueError, match="mask must be bool"):
        changed(inputs, mask=torch.ones(2))
