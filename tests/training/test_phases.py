import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.config import ObjectiveConfig, RolloutConfig
from megatron_rlvr.core import FinishReason, RLVRError, RolloutBatch, Sample, StepMetrics, Verdict
from megatron_rlvr.policy import cpu_runtime

cpu_runtime.install()

from megatron_rlvr.entropy import RunPlan, build_recipe  # noqa: E402
from megatron_rlvr.objective import grpo_advantages  # noqa: E402
from megatron_rlvr.policy.policy import TokenPass  # noqa: E402
from megatron_rlvr.training.phases import (  # noqa: E402
    evaluate,
    handle_overlong,
    minibatches,
    prepare,
    record_ages,
    record_samples,
    token_ages,
    weigh,
)

PAR = build_recipe("par", RunPlan(total_steps=10, steps_per_epoch=5))


def weighed(prepared, metrics, recipe=PAR):
    outcomes = prepared.outcomes
    advantages_B = grpo_advantages(outcomes.rewards_B, outcomes.groups_B, outcomes.valid_B)
    return weigh(prepared, advantages_B, recipe.rule, metrics, gain=0.0, seed=0)


def sample(group=0, response=(5, 1), text="x", reason=FinishReason.STOP, version=0, prompt=(2, 3)):
    return Sample(group, list(prompt), list(response), [-0.5] * len(response), text, reason, version)


def batch_of(verdicts_by_group):
    samples = [sample(group, response=(5,) * (1 + row)) for group, row in verdicts_by_group]
    return samples, RolloutBatch.from_samples(samples, pad_id=0)


def test_rows_are_padded_and_masked():
    batch = RolloutBatch.from_samples([sample(0, (5, 1)), sample(1, (6, 7, 8), prompt=(4,))], pad_id=9)
    assert batch.tokens_BL.tolist() == [[2, 3, 5, 1], [4, 6, 7, 8]]
    assert batch.response_mask_BL.tolist() == [[False, False, True, True], [False, True, True, True]]
    assert batch.rollout_logprobs_BL.tolist() == [[0, 0, -0.5, -0.5], [0, -0.5, -0.5, -0.5]]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "no samples"),
        ([sample(response=())], "0 response tokens"),
        ([sample(prompt=())], "0 prompt tokens"),
    ],
)
def test_unusable_samples_are_refused(samples, said):
    with pytest.raises(RLVRError, match=said):
        RolloutBatch.from_samples(samples, pad_id=0)


def test_only_accepted_earns_a_reward_and_infra_errors_are_no_verdict():
    _, batch = batch_of([(0, row) for row in range(len(Verdict))])
    judged = batch.with_verdicts(list(Verdict))
    assert [bool(reward) for reward in judged.rewards_B] == [verdict is Verdict.ACCEPTED for verdict in Verdict]
    assert [bool(valid) for valid in judged.valid_B] == [verdict is not Verdict.INFRA_ERROR for verdict in Verdict]
    with pytest.raises(ValueError, match="verdicts for"):
        batch.with_verdicts([])


def test_prepare_by_hand():
    _, batch = batch_of([(0, 0), (0, 1), (0, 2)])  # 1, 2 and 3 response tokens
    batch = batch.with_verdicts([Verdict.ACCEPTED, Verdict.WRONG_ANSWER, Verdict.INFRA_ERROR])
    logprobs = torch.full(batch.tokens_BL.shape, -0.5)
    entropy = torch.arange(batch.tokens_BL.numel(), dtype=torch.float32).view(batch.tokens_BL.shape)
    metrics = StepMetrics()
    prepared = prepare(batch, TokenPass(logprobs, entropy), metrics, recipe=PAR)
    rows = weighed(prepared, metrics)
    # rows of 5 columns, prompts in columns 0-1: tokens 2; 7, 8; the third row has no verdict
    assert prepared.signal == prepared.entropy == pytest.approx((2 + 7 + 8) / 3)
    assert rows.mask_BL.sum().item() == 3
    assert rows.given["advantages"][0, 2].item() == pytest.approx(2**-0.5, abs=1e-5)
    assert rows.given["advantages"][1, 2].item() == pytest.approx(-(2**-0.5), abs=1e-5)
    assert rows.given["advantages"][2].abs().sum().item() == 0
    assert rows.given["weight"].equal(rows.mask_BL.float())
    means = metrics.means()
    assert means["reward_mean"] == 0.5
    assert means["rollout_trainer_kl"] == 0
    assert means["informative_share"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("signal", "expected"), [("rollout", 17 / 3), ("sequence", (2 + 7.5) / 2), ("nucleus", 34 / 3), ("policy", None)]
)
def test_the_signals_by_hand(signal, expected):
    _, batch = batch_of([(0, 0), (0, 1), (0, 2)])
    batch = batch.with_verdicts([Verdict.ACCEPTED, Verdict.WRONG_ANSWER, Verdict.INFRA_ERROR])
    entropy = torch.arange(batch.tokens_BL.numel(), dtype=torch.float32).view(batch.tokens_BL.shape)
    recipe = build_recipe("par", RunPlan(total_steps=10, steps_per_epoch=5), signal=signal)
    token_pass = TokenPass(torch.full(batch.tokens_BL.shape, -0.5), entropy, 2 * entropy)
    prepared = prepare(batch, token_pass, StepMetrics(), recipe=recipe)
    assert prepared.signal == (None if expected is None else pytest.approx(expected))
    assert prepared.entropy == pytest.approx(17 / 3)


def test_a_step_without_verdicts_is_refused():
    _, batch = batch_of([(0, 0), (0, 1)])
    batch = batch.with_verdicts([Verdict.INFRA_ERROR] * 2)
    zeros = torch.zeros(batch.tokens_BL.shape)
    with pytest.raises(RLVRError, match="verdict"):
        prepare(batch, TokenPass(zeros, zeros), StepMetrics(), recipe=PAR)


@given(
    prompts=st.integers(1, 6),
    group_size=st.integers(2, 4),
    pieces=st.integers(1, 3),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_every_epoch_deals_every_row_once_and_keeps_prompts_whole(prompts, group_size, pieces, epochs, seed):
    prompts *= pieces
    _, batch = batch_of([(group, row) for group in range(prompts) for row in range(group_size)])
    batch = batch.with_verdicts([Verdict.ACCEPTED, Verdict.WRONG_ANSWER, *[Verdict.ACCEPTED] * (len(batch) - 2)])
    marks = torch.arange(float(len(batch)))[:, None].expand(batch.tokens_BL.shape)
    token_pass = TokenPass(marks, torch.zeros(batch.tokens_BL.shape))
    rows = weighed(prepare(batch, token_pass, StepMetrics(), recipe=PAR), StepMetrics())
    objective = ObjectiveConfig(minibatches=pieces, epochs=epochs)
    # every row has a response token in column 2
    deals = [list(minibatches(rows, batch.groups_B, objective, seed)) for _ in range(2)]
    dealt, again = ([part.given["old_logprob"][:, 2].long().tolist() for part in deal] for deal in deals)
    assert dealt == again
    assert len(dealt) == pieces * epochs
    for epoch in range(epochs):
        piece_rows = dealt[epoch * pieces : (epoch + 1) * pieces]
        assert sorted(row for rows in piece_rows for row in rows) == list(range(len(batch)))
        for rows in piece_rows:
            assert len(rows) == len(batch) // pieces
            assert len({row // group_size for row in rows}) == prompts // pieces


def test_evaluation_leaves_out_what_has_no_verdict():
    samples = [sample(0, text="a"), sample(0, text="a"), sample(0, text="b"), sample(1, text="c"), sample(1, text="d")]
    right, wrong, unknown = Verdict.ACCEPTED, Verdict.WRONG_ANSWER, Verdict.INFRA_ERROR
    result = evaluate(samples, [right, right, unknown, right, wrong])
    assert result.avg_at_k == 0.75
    assert result.pass_at_k == {1: 0.75, 2: 1.0}
    assert result.distinct_correct == 1.0
    assert result.samples == 4


def test_sample_records():
    metrics = StepMetrics()
    samples = [sample(response=(5,)), sample(response=(5, 6, 7), reason=FinishReason.LENGTH)]
    record_samples(samples, [Verdict.ACCEPTED, Verdict.TIME_LIMIT], metrics)
    means = metrics.means()
    assert means["response_tokens"] == 2
    assert means["truncated_share"] == 0.5
    assert means["verdict/accepted"] == means["verdict/time_limit"] == 0.5
    assert sum(value for name, value in means.items() if name.startswith("verdict/")) == 1


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 5)), min_size=1, max_size=8), st.integers(0, 8))
def test_step_metrics_do_not_depend_on_the_grouping(parts, cut):
    whole, left = StepMetrics(), StepMetrics()
    for total, count in parts:
        whole.add("x", total, count)
    for half in (parts[:cut], parts[cut:]):
        left.add("x", sum(total for total, _ in half), sum(count for _, count in half))
    assert left.means() == pytest.approx(whole.means())


def test_truncated_responses_are_left_out_or_penalised_as_dapo_does():
    """Budget 10, buffer 4: lengths 6 and 8 lose 0 and 1/2; the truncated one, of 10, loses 1."""
    samples = [sample(0, (5,) * 6), sample(0, (5,) * 8), sample(0, (5,) * 10, reason=FinishReason.LENGTH)]
    batch = RolloutBatch.from_samples(samples, 0).with_verdicts(
        [Verdict.ACCEPTED, Verdict.ACCEPTED, Verdict.TIME_LIMIT]
    )
    assert handle_overlong(batch, RolloutConfig(max_new_tokens=10)) is batch
    penalized = handle_overlong(batch, RolloutConfig(max_new_tokens=10, overlong="penalize", overlong_buffer=4))
    assert penalized.rewards_B.tolist() == [1.0, 0.5, -1.0]
    assert penalized.response_mask_BL.equal(batch.response_mask_BL)
    dropped = handle_overlong(batch, RolloutConfig(max_new_tokens=10, overlong="drop"))
    assert dropped.rewards_B.equal(batch.rewards_B)
    metrics, flat = StepMetrics(), torch.full(batch.tokens_BL.shape, -0.5)
    prepared = prepare(dropped, TokenPass(flat, -flat), metrics, recipe=PAR)
    rows = weighed(prepared, metrics)
    assert rows.mask_BL.sum(1).tolist() == [6, 8, 0]
    # the dropped response's reward still counts for the others: (1, 1, 0) has mean 2/3 and deviation 3 ** -0.5
    assert rows.given["advantages"][0, 2].item() == pytest.approx(1 / 3 * 3**0.5, abs=1e-5)


def test_ages_by_hand():
    """Step 5; a response that began under version 3 and went on under 5, and one of version 4."""
    mixed = sample(0, (5, 6, 7), version=3)
    mixed.version_spans = [(3, 0, 1), (5, 1, 3)]
    batch = RolloutBatch.from_samples([mixed, sample(0, (5, 6), version=4)], 0)
    ages_BL = token_ages(batch, 5, 2)
    assert ages_BL.tolist() == [[0, 0, 2, 0, 0], [0, 0, 1, 1, 0]]
    batch = batch.with_verdicts([Verdict.ACCEPTED, Verdict.WRONG_ANSWER])
    metrics, logprobs_BL = StepMetrics(), torch.full(ages_BL.shape, -0.5) - 0.1 * ages_BL
    prepared = prepare(batch, TokenPass(logprobs_BL, torch.zeros(ages_BL.shape)), StepMetrics(), recipe=PAR)
    record_ages(batch, ages_BL, prepared.stats, metrics)
    means = metrics.means()
    assert means["staleness"] == pytest.approx(4 / 5)
    for age, gap in ((0, 0.0), (1, -0.1), (2, -0.2)):
        assert means[f"rollout_trainer_kl/age_{age}"] == pytest.approx(math.exp(gap) - 1 - gap, abs=1e-6)


def test_fresh_rows_have_no_ages_to_compare():
    batch = RolloutBatch.from_samples([sample(version=4)], 0).with_verdicts([Verdict.ACCEPTED])
    zeros, metrics = torch.zeros(batch.tokens_BL.shape), StepMetrics()
    prepared = prepare(batch, TokenPass(zeros, zeros), StepMetrics(), recipe=PAR)
    record_ages(batch, token_ages(batch, 4, 0), prepared.stats, metrics)
    assert metrics.means() == {"staleness": 0.0}


@pytest.mark.parametrize(("version", "step", "bound"), [(3, 5, 1), (6, 5, 1), (4, 5, 0)])
def test_tokens_of_other_weights_than_the_bound_allows_are_refused(version, step, bound):
    batch = RolloutBatch.from_samples([sample(version=5), sample(version=version)], 0)
    with pytest.raises(
        RLVRError, match=f"step {step} got tokens of weight version {version}, where {step - bound} to 5"
    ):
        token_ages(batch, step, bound)
