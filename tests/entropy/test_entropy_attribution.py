"""Why did H move: exact where the theory is (small plain gradient steps on independent logits), honest elsewhere."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy import Attribution
from megatron_rlvr.objective import LossInputs, LossSettings, policy_loss
from megatron_rlvr.vocab import token_stats

CONTEXTS, VOCAB, STEPS = 40, 12, 12


def means_of(outputs):
    return {name: float(total / count) for name, (total, count) in outputs.metrics.items()}


def one_update(logits, advantages, targets, rate, settings=None):
    """A plain gradient step on one row of logits per token; the metrics and the new logits."""
    logits = logits.clone().requires_grad_()
    stats = token_stats(logits, targets, extras=True)
    inputs = LossInputs(
        stats.logprob,
        old_logprob=stats.logprob.detach(),
        advantages=advantages,
        entropy=stats.entropy,
        mask=torch.ones_like(targets, dtype=torch.bool),
        entropy_slope=stats.extras.entropy_slope,
        entropy_grad_norm=stats.extras.entropy_grad_norm,
    )
    outputs = policy_loss(inputs, settings or LossSettings())
    torch.autograd.backward(outputs.loss_sum)
    return means_of(outputs), (logits - rate * logits.grad).detach()


def entropy(logits):
    return float(token_stats(logits, torch.zeros(len(logits), dtype=torch.long)).entropy.mean())


@pytest.mark.parametrize(("positive_weight", "bonus"), [(1.0, 0.0), (0.3, 0.0), (1.0, 1.0)])
def test_a_small_gradient_step_moves_the_entropy_by_the_drive(positive_weight, bonus):
    torch.manual_seed(0)
    logits, rate = torch.randn(CONTEXTS, VOCAB, dtype=torch.float64), 1e-5
    advantages, targets = torch.randn(CONTEXTS, dtype=torch.float64), torch.randint(VOCAB, (CONTEXTS,))
    settings = LossSettings(positive_weight=positive_weight, bonus=bonus)
    means, moved = one_update(logits, advantages, targets, rate, settings)
    drive = sum(means[f"entropy_drive/{cause}"] for cause in ("positive", "negative", "bonus"))
    assert (entropy(moved) - entropy(logits)) / rate == pytest.approx(drive, rel=1e-3)
    if bonus:
        assert means["entropy_drive/bonus"] > 0.0
        return
    # each sign alone
    for sign, part in (("positive", advantages.clamp(min=0)), ("negative", advantages.clamp(max=0))):
        _, alone = one_update(logits, part, targets, rate, settings)
        assert (entropy(alone) - entropy(logits)) / rate == pytest.approx(means[f"entropy_drive/{sign}"], rel=1e-3)


def test_an_advantage_that_says_nothing_moves_nothing_on_average():
    """Enumeration: under the policy itself the expected first-order change is 0 for a constant advantage."""
    torch.manual_seed(1)
    logits = torch.randn(1, VOCAB, dtype=torch.float64).expand(VOCAB, VOCAB)
    stats = token_stats(logits, torch.arange(VOCAB), extras=True)
    assert float((stats.logprob.exp() * stats.extras.entropy_slope).sum()) == pytest.approx(0.0, abs=1e-12)


def followed(rate):
    """A run of plain gradient steps with its attribution's records."""
    torch.manual_seed(2)
    logits, attribution, records = torch.randn(CONTEXTS, VOCAB, dtype=torch.float64), Attribution(), []
    for _ in range(STEPS):
        records.append(attribution.observe(entropy(logits)))
        advantages, targets = torch.randn(CONTEXTS, dtype=torch.float64), torch.randint(VOCAB, (CONTEXTS,))
        means, logits = one_update(logits, advantages, targets, rate)
        means["entropy_drive/age_1"] = means["entropy_drive/positive"] + means["entropy_drive/negative"]
        records[-1] |= attribution.record(means)
    return records


def test_where_the_theory_holds_the_prediction_does():
    first, second, *others = followed(rate=1e-4)
    assert not any(name.startswith("entropy_change/") for name in first)
    assert "entropy_change/observed" in second
    assert "entropy_change/predicted" not in second
    for record in others:
        assert abs(record["entropy_change/error"]) < 0.02 * abs(record["entropy_change/observed"]) + 1e-9
    assert others[-1]["entropy_change/correlation"] == pytest.approx(1.0, abs=1e-3)
    assert others[-1]["entropy_change/sign_agreement"] == 1.0


def test_where_it_does_not_the_error_says_so():
    errors = [abs(record["entropy_change/error"]) for record in followed(rate=30.0)[2:]]
    sizes = [abs(record["entropy_change/observed"]) for record in followed(rate=30.0)[2:]]
    assert sum(errors) > 0.3 * sum(sizes)


def test_clipped_tokens_count_as_withheld():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3))
    stats = token_stats(logits, torch.arange(4), extras=True)
    inputs = LossInputs(
        stats.logprob,
        old_logprob=stats.logprob - torch.tensor([1.0, 0.0, -1.0, 0.0]),  # far up, on, far down, on
        advantages=torch.tensor([1.0, 1.0, -1.0, -1.0]),
        entropy=stats.entropy,
        mask=torch.ones(4, dtype=torch.bool),
        entropy_slope=stats.extras.entropy_slope,
    )
    metrics = policy_loss(inputs, LossSettings()).metrics
    slope = stats.extras.entropy_slope
    assert float(metrics["entropy_drive/positive"][0]) == pytest.approx(float(slope[1]))
    assert float(metrics["entropy_drive/negative"][0]) == pytest.approx(-float(slope[3]))
    assert float(metrics["entropy_drive/withheld_positive"][0]) * float(slope[0]) > 0
    assert float(metrics["entropy_drive/withheld_negative"][0]) * -float(slope[2]) > 0


@given(st.lists(st.tuples(*[st.floats(-1, 1)] * 4), min_size=1, max_size=4))
def test_shares_are_signed_and_whole(ages):
    means = {f"entropy_drive/age_{n}": age[0] for n, age in enumerate(ages, start=1)}
    names = ("positive", "negative", "withheld_positive", "withheld_negative")
    means |= dict(zip((f"entropy_drive/{name}" for name in names), ages[0], strict=True)) | {"entropy_drive/bonus": 0.5}
    shares = Attribution().record(means)
    for group in (("positive", "negative", "bonus"), [f"age_{n}" for n in range(1, len(ages) + 1)]):
        values = [shares[f"entropy_share/{name}"] for name in group]
        assert sum(map(abs, values)) == pytest.approx(1.0) or not any(values)


def test_a_resumed_attribution_goes_on_bit_for_bit():
    means = [
        {f"entropy_drive/{name}": value * k for name, value in zip(("positive", "negative"), (0.3, -0.1), strict=True)}
        | {"entropy_drive/withheld_positive": 0.1, "entropy_drive/withheld_negative": 0.0, "entropy_drive/bonus": 0.2}
        for k in (1.0, -2.0, 0.5, 3.0)
    ]
    whole, cut = Attribution(), Attribution()
    for k, step in enumerate(means):
        if k == 2:
            saved, cut = json.loads(json.dumps(cut.state_dict())), Attribution()
            cut.load_state_dict(saved)
        assert cut.observe(1.0 - 0.1 * k * k) == whole.observe(1.0 - 0.1 * k * k)
        assert cut.record(step) == whole.record(step)
    with pytest.raises(RLVRError, match="lacks drive"):
        cut.load_state_dict({name: value for name, value in whole.state_dict().items() if name != "drive"})
