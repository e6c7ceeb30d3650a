"""What is added to the surrogate, token weights, masks, splits, attribution of entropy, and refusals in words."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import FIELDS, SURROGATES, everything, gradient, loss_and_gradient, part, replaced, tokens

from megatron_rlvr.core import RLVRError
from megatron_rlvr.objective import LossInputs, LossSettings, check_composition, policy_loss
from megatron_rlvr.objective.loss import KINK

INF = math.inf
SEEDS = st.integers(0, 10**6)
FULL = {
    name: replace(settings, positive_weight=0.6, negative_weight=1.2, bonus=0.02, kl=0.1, kl_estimator="k2")
    for name, settings in SURROGATES.items()
}
EVERY = pytest.mark.parametrize("name", SURROGATES)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def hand(**fields: torch.Tensor) -> LossInputs:
    """Ratios 1.1, 1.5, 0.5 with advantages 2, 2, -1 from old log-probs of -1."""
    values = {
        "logprob": (vector(1.1, 1.5, 0.5).log() - 1.0).requires_grad_(),
        "old_logprob": vector(-1.0, -1.0, -1.0),
        "advantages": vector(2.0, 2.0, -1.0),
        "entropy": vector(0.1, 0.2, 0.3).requires_grad_(),
        "mask": torch.ones(3, dtype=torch.bool),
    }
    return LossInputs(**values | fields)


def sums(inputs: LossInputs, settings: LossSettings) -> dict[str, float]:
    metrics = policy_loss(inputs, settings).metrics
    assert {int(count) for _, count in metrics.values()} == {int(inputs.mask.sum())}
    assert not any(total.requires_grad for total, _ in metrics.values())
    return {name: float(total) for name, (total, _) in metrics.items()}


def test_every_term_by_hand() -> None:
    inputs = hand(
        weight=vector(0.5, 1.0, 2.0),
        scale=vector(1.0, 3.0, 2.0),
        penalty=vector(0.0, 0.7, 0.0),
        bonus=vector(1.0, 0.0, 2.0),
        reference_logprob=vector(-1.0, -1.0, -1.0),
    )
    settings = LossSettings(positive_weight=0.5, bonus=0.01, kl=0.1, kl_estimator="k2")
    outputs = policy_loss(inputs, settings)
    kl = [0.5 * math.log(r) ** 2 for r in (1.1, 1.5, 0.5)]
    expected = [
        -0.25 * 2 * 1.1 + 0.1 * kl[0] - 0.01 * 0.1,
        3 * (-0.5 * 2 * 1.5 + 0.1 * kl[1] + 0.7 * (math.log(1.5) - KINK / 2)),  # a penalised ratio is not clipped
        2 * (2 * 0.8 + 0.1 * kl[2] - 0.01 * 2 * 0.3),
    ]
    assert outputs.losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert gradient(outputs, inputs.entropy).tolist() == pytest.approx([-0.01, 0.0, -0.04], rel=1e-12)
    got = sums(inputs, settings)
    assert {name: got[name] for name in ("weight", "kl_reference", "penalty", "entropy_bonus")} == pytest.approx(
        {
            "weight": 0.25 + 0.5 + 2.0,
            "kl_reference": sum(kl),
            "penalty": 0.7 * (math.log(1.5) - KINK / 2),
            "entropy_bonus": 0.01 * (0.1 + 0.6),
        },
        rel=1e-12,
    )


def test_the_nucleus_takes_the_place_of_the_entropy() -> None:
    nucleus = vector(1.0, 2.0, 3.0).requires_grad_()
    inputs = hand(nucleus_entropy=nucleus)
    outputs = policy_loss(inputs, LossSettings(bonus=-0.5))
    assert gradient(outputs, nucleus).tolist() == [0.5] * 3
    assert sums(inputs, LossSettings(bonus=-0.5))["entropy_bonus"] == -3.0


def test_a_penalised_token_keeps_its_gradient_beyond_the_clip() -> None:
    clipped, held = hand(), hand(penalty=vector(0.0, 0.7, 0.0))
    assert gradient(policy_loss(clipped, LossSettings()), clipped.logprob)[1] == 0.0
    # d/dlogp (-A r + 0.7 |log r|) = -2 x 1.5 + 0.7
    assert float(gradient(policy_loss(held, LossSettings()), held.logprob)[1]) == pytest.approx(-3.0 + 0.7)
    slopes = {"entropy_slope": vector(1.0, 1.0, 1.0)}
    withheld = "entropy_drive/withheld_positive"
    assert sums(hand(**slopes), LossSettings())[withheld] != 0.0
    assert sums(hand(penalty=vector(0.0, 0.7, 0.0), **slopes), LossSettings())[withheld] == 0.0


def test_a_rounding_error_is_no_penalty() -> None:
    noise = vector(1e-7, -1e-7, 0.0)
    inputs = hand(penalty=vector(1.0, 1.0, 1.0), logprob=(-1.0 + noise).requires_grad_())
    assert gradient(policy_loss(inputs, LossSettings()), inputs.logprob).tolist() == pytest.approx(
        [-2, -2, 1], abs=1e-3
    )


def test_the_penalty_vanishes_on_policy() -> None:
    inputs = hand(penalty=vector(1.0, 1.0, 1.0), logprob=vector(-1.0, -1.0, -1.0).requires_grad_())
    assert gradient(policy_loss(inputs, LossSettings()), inputs.logprob).tolist() == [-2.0, -2.0, 1.0]


def test_opsm_drops_negative_sequences_that_the_policy_left() -> None:
    # mean gaps .6 (dropped), .6 but positive, .4, and .6 with the masked-out token left aside
    gaps = [0.9, 0.3, 0.9, 0.3, 0.5, 0.3, 0.6, 99.0]
    inputs = LossInputs(
        logprob=(-1.0 - vector(*gaps)).requires_grad_(),
        old_logprob=torch.full((8,), -1.0, dtype=torch.float64),
        advantages=vector(-1, -1, 1, 1, -1, -1, -1, -1),
        entropy=torch.zeros(8, dtype=torch.float64),
        mask=torch.tensor([True] * 7 + [False]),
        sequence=torch.arange(8) // 2,
    )
    settings = LossSettings("none", opsm=0.5)
    assert gradient(policy_loss(inputs, settings), inputs.logprob).tolist() == [0, 0, -1, -1, 1, 1, 0, 0]
    assert sums(inputs, settings)["opsm_fraction"] == 3.0
    assert int(policy_loss(inputs, settings).count) == 7


@EVERY
@pytest.mark.parametrize("garbage", [math.nan, INF, -INF, 1e38])
def test_masked_out_garbage_reaches_nothing(name: str, garbage: float) -> None:
    settings = replace(FULL[name], opsm=0.2)
    clean = everything(11)
    base, base_gradient = loss_and_gradient(clean, settings)
    for field in FIELDS:
        if field == "mask":
            continue
        filler = -(2**60) if field == "sequence" else garbage
        dirty = replaced(clean, **{field: getattr(clean, field).detach().masked_fill(~clean.mask, filler)})
        got, got_gradient = loss_and_gradient(dirty, settings)
        assert torch.equal(got.losses, base.losses), field
        assert torch.equal(got_gradient, base_gradient), field
        for metric, (total, count) in base.metrics.items():
            assert torch.equal(got.metrics[metric][0], total), (field, metric)
            assert torch.equal(got.metrics[metric][1], count), (field, metric)


@EVERY
@pytest.mark.parametrize("field", ["logprob", "advantages", "weight", "scale", "penalty", "reference_logprob"])
def test_masked_in_garbage_is_not_hidden(name: str, field: str) -> None:
    clean = everything(2)
    place = int(clean.mask.nonzero()[0])
    poisoned = getattr(clean, field).detach().clone()
    poisoned[place] = math.nan
    assert policy_loss(replaced(clean, **{field: poisoned}), FULL[name]).loss_sum.isnan()


@pytest.mark.parametrize("name", [name for name, settings in SURROGATES.items() if settings.separable])
@given(seed=SEEDS, cuts=st.lists(st.integers(0, 24), max_size=4))
def test_any_split_adds_up(name: str, seed: int, cuts: list[int]) -> None:
    whole = everything(seed)
    total = policy_loss(whole, FULL[name])
    bounds = itertools.pairwise([0, *sorted(cuts), 24])
    parts = [policy_loss(part(whole, slice(*pair)), FULL[name]) for pair in bounds]
    torch.testing.assert_close(torch.cat([p.losses for p in parts]), total.losses, rtol=1e-12, atol=1e-12)
    for metric, (value, count) in total.metrics.items():
        assert all(set(p.metrics) == set(total.metrics) for p in parts)
        assert sum(float(p.metrics[metric][0]) for p in parts) == pytest.approx(float(value), rel=1e-9, abs=1e-9)
        assert sum(int(p.metrics[metric][1]) for p in parts) == int(count)


def test_sequence_losses_add_up_when_cut_between_sequences() -> None:
    whole, settings = everything(3, size=25), replace(FULL["gspo"], opsm=0.05)
    parts = [policy_loss(part(whole, slice(*pair)), settings) for pair in ((0, 10), (10, 15), (15, 25))]
    losses = policy_loss(whole, settings).losses
    torch.testing.assert_close(torch.cat([p.losses for p in parts]), losses, rtol=1e-12, atol=1e-14)


@EVERY
@given(seed=SEEDS)
def test_entropy_drive_is_the_gradient_times_the_slope(name: str, seed: int) -> None:
    plain = replace(SURROGATES[name], positive_weight=0.6)
    inputs = replaced(everything(seed), penalty=None, reference_logprob=None)
    got = sums(inputs, plain)
    push = -loss_and_gradient(inputs, plain)[1] * inputs.entropy_slope
    for sign, side in (("positive", inputs.advantages > 0), ("negative", inputs.advantages < 0)):
        expected = float(push[side & inputs.mask].sum())
        assert got[f"entropy_drive/{sign}"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    free = replace(plain, clip_low=1.0, clip_high=INF, dual_clip=INF)
    if name in ("ppo", "dual", "gspo"):
        for sign in ("positive", "negative"):
            both = got[f"entropy_drive/{sign}"] + got[f"entropy_drive/withheld_{sign}"]
            assert both == pytest.approx(sums(inputs, free)[f"entropy_drive/{sign}"], rel=1e-9, abs=1e-9)
    else:
        assert got["entropy_drive/withheld_positive"] == got["entropy_drive/withheld_negative"] == 0.0


def test_withheld_drive_by_hand() -> None:
    slopes = {"entropy_slope": vector(0.1, 0.2, 0.3), "entropy_grad_norm": vector(1.0, 2.0, 3.0)}
    got = sums(hand(**slopes, bonus=vector(1.0, 0.5, 0.0)), LossSettings(bonus=0.1))
    assert {name: value for name, value in got.items() if "drive" in name} == pytest.approx(
        {
            "entropy_drive/positive": 2 * 1.1 * 0.1,
            "entropy_drive/withheld_positive": 2 * 1.5 * 0.2,
            "entropy_drive/negative": 0.0,
            "entropy_drive/withheld_negative": -0.5 * 0.3,
            "entropy_drive/bonus": 0.1 * (1.0 * 1.0 + 0.5 * 4.0),
        }
    )


def test_entropy_drive_predicts_the_entropy_of_one_softmax() -> None:
    """One logit step along the policy gradient of one token changes its entropy by the drive, to first order."""
    logits = vector(0.3, -1.0, 0.8, 0.1).requires_grad_()

    def entropy(z: torch.Tensor) -> torch.Tensor:
        return -(z.softmax(0) * z.log_softmax(0)).sum()

    logprob = logits.log_softmax(0)[1:2]
    (up,) = torch.autograd.grad(logprob.sum(), logits, retain_graph=True)
    (entropy_gradient,) = torch.autograd.grad(entropy(logits), logits)
    inputs = LossInputs(
        *(logprob, logprob.detach() - 0.05, vector(-1.3), vector(0.0), torch.ones(1, dtype=torch.bool)),
        entropy_slope=(up * entropy_gradient).sum()[None],
    )
    outputs = policy_loss(inputs, LossSettings())
    (down,) = torch.autograd.grad(outputs.loss_sum, logits)
    change = (entropy(logits - 1e-6 * down) - entropy(logits + 1e-6 * down)).detach() / 2e-6
    assert float(outputs.metrics["entropy_drive/negative"][0]) == pytest.approx(float(change), rel=1e-7)


@EVERY
def test_metric_names_depend_on_settings_and_fields_alone(name: str) -> None:
    empty = replaced(everything(1), mask=torch.zeros(24, dtype=torch.bool))
    assert list(policy_loss(empty, FULL[name]).metrics) == list(policy_loss(everything(5), FULL[name]).metrics)
    assert policy_loss(empty, FULL[name]).loss_sum.item() == 0.0
    assert not loss_and_gradient(empty, FULL[name])[1].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"surrogate": "trpo"}, "surrogate is 'trpo'; choose one of ppo, "),
        ({"kl_estimator": "k4"}, "kl_estimator is 'k4'; choose one of k1, "),
        ({"clip_low": -0.1}, r"clip_low -0\.1 must lie in"),
        ({"clip_low": 1.1}, r"clip_low 1\.1 must lie in"),
        ({"clip_high": math.nan}, "clip_high nan must not be negative"),
        ({"positive_weight": -1.0}, r"positive_weight is -1\.0 but"),
        ({"negative_weight": INF}, "negative_weight is inf but"),
        ({"gppo_low": math.nan}, "gppo_low is nan but"),
        ({"kl": -1.0}, r"kl is -1\.0 but"),
        ({"bonus": INF}, "bonus is inf but"),
        ({"dual_clip": 0.5}, r"dual_clip is 0\.5 but"),
        ({"dual_clip": 3.0, "surrogate": "cispo"}, "surrogate cispo has none; set surrogate to ppo or gspo"),
        ({"opsm": -1.0}, r"opsm is -1\.0 but"),
    ],
)
def test_bad_settings_are_refused(change: dict, words: str) -> None:
    with pytest.raises(RLVRError, match=words):
        LossSettings(**change)


SOUND = {"estimator": "grpo", "whiten": False, "token_advantages": False, "penalty": False, "updates": 4}


@pytest.mark.parametrize(
    ("surrogate", "change", "words"),
    [
        ("ppo", {"whiten": True, "estimator": "outcome"}, "sign of the outcome advantages"),
        ("ppo", {"whiten": True, "estimator": "asym_grpo"}, "sign of the asym_grpo advantages"),
        ("gspo", {"token_advantages": True}, "gspo has one ratio and one advantage"),
        ("cispo", {"penalty": True}, "KL-Cov penalty belongs to surrogate ppo, not cispo"),
        ("ppo", {"penalty": True, "updates": 1}, "KL-Cov penalty is 0 on the first"),
    ],
)
def test_contradictions_are_refused(surrogate: str, change: dict, words: str) -> None:
    for name in SURROGATES:
        check_composition(SURROGATES[name], **SOUND)
    check_composition(LossSettings(), **SOUND | {"whiten": True, "token_advantages": True, "penalty": True})
    with pytest.raises(RLVRError, match=words):
        check_composition(LossSettings(surrogate), **SOUND | change)


def test_missing_or_misshapen_fields_are_named() -> None:
    inputs = replaced(tokens(0), sequence=None)
    for settings, words in (
        (LossSettings("gspo"), "surrogate gspo needs LossInputs.sequence"),
        (LossSettings(opsm=0.1), "a finite opsm needs LossInputs.sequence"),
        (LossSettings(kl=0.1), "a positive kl needs LossInputs.reference_logprob"),
    ):
        with pytest.raises(ValueError, match=words):
            policy_loss(inputs, settings)
    with pytest.raises(ValueError, match=r"scale has shape \[24, 1\]"):
        replaced(inputs, scale=torch.ones(24, 1))
    with pytest.raises(ValueError, match="sequence must be int64"):
        replaced(inputs, sequence=torch.zeros(24))
