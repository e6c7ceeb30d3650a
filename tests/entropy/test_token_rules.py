"""Token rules against arithmetic by hand, their invariants, and the same plans over any split of the tokens."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_shards import RULES, make_batch, places, run_on, run_rank, select, special_values
from torch.multiprocessing.spawn import start_processes

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy.selection import uniform
from megatron_rlvr.entropy.token_masks import (
    ClipCov,
    KlCov,
    NucleusBonus,
    RandomPositives,
    TopEntropy,
    Uniform,
    masked_nucleus_entropy,
)
from megatron_rlvr.entropy.token_weights import (
    ConfidentSigns,
    EntropyAdvantage,
    LogProbAdvantage,
    LowProbPositives,
    Steer,
    Surprisal,
)
from megatron_rlvr.entropy.tokens import TokenBatch, TokenPlan

Results = list[dict[tuple[int, torch.dtype], dict[str, Any]]]
SELECTIONS = ("surprisal", "surprisal_both", "clip_cov", "kl_cov", "top_entropy", "nucleus_bonus", "random_positives")


def tokens(
    logprob: list[float],
    advantages: list[float],
    entropy: list[float] | None = None,
    row: list[int] | None = None,
    nucleus: list[float] | None = None,
    seed: int = 0,
) -> TokenBatch:
    """A batch in fp64, numbered in order, of one row unless said."""
    count = len(logprob)
    return TokenBatch(
        logprob=torch.tensor(logprob, dtype=torch.float64),
        entropy=torch.tensor(entropy or [0.0] * count, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        row=torch.tensor(row or [0] * count),
        index=torch.arange(count),
        nucleus_entropy=None if nucleus is None else torch.tensor(nucleus, dtype=torch.float64),
        seed=seed,
    )


def close(got: torch.Tensor | None, expected: list[float]) -> None:
    assert got is not None
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=1e-14, atol=1e-14)


def plain(plan: TokenPlan, batch: TokenBatch, *but: str) -> None:
    """Nothing is asked of the tokens but the fields named."""
    assert "advantages" in but or torch.equal(plan.advantages, batch.advantages)
    assert "weight" in but or torch.equal(plan.weight, torch.ones_like(batch.advantages))
    assert "penalty" in but or plan.penalty is None
    assert "bonus" in but or plan.bonus is None


def test_uniform_asks_nothing() -> None:
    batch = tokens([-0.1, -2.0], [1.0, -1.0])
    plain(Uniform()(batch, 0.7), batch)


def test_confident_signs() -> None:
    batch = tokens([math.log(p) for p in (0.96, 0.96, 0.96, 0.5, 0.94, 0.94)], [2.0, -3.0, 0.0, 2.0, 2.0, -3.0])
    # Confident are the first three: 1 + 0.25 for A > 0, 1 - 0.25 for A < 0 and 1 for A = 0.
    plan = ConfidentSigns()(batch, 0.25)
    close(plan.weight, [1.25, 0.75, 1.0, 1.0, 1.0, 1.0])
    plain(plan, batch, "weight")
    close(ConfidentSigns()(batch, -1.0).weight, [0.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    close(ConfidentSigns(threshold=0.9)(batch, 0.25).weight, [1.25, 0.75, 1.0, 1.0, 1.25, 0.75])


def test_surprisal() -> None:
    batch = tokens(
        [-1.0, -9.0, -2.0, -9.0, -3.0, -8.0, -4.0, -7.0, -1.0], [1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0]
    )
    # 40 % of five positives are two: surprisals 9 at places 1 and 3. 40 % of three negatives are 1.2: 8 at place 5.
    plan = Surprisal(share=0.4)(batch, 0.1)
    close(plan.weight, [1.0, 1.1, 1.0, 1.1, 1.0, 1.0, 1.0, 1.0, 1.0])
    plain(plan, batch, "weight")
    both = Surprisal(share=0.4, both_signs=True)(batch, 0.1)
    close(both.weight, [1.0, 1.1, 1.0, 1.1, 1.0, 0.9, 1.0, 1.0, 1.0])
    # 10 % of five is half a token: at least one, and of the equal ones the first.
    close(Surprisal()(batch, 0.1).weight, [1.0, 1.1] + [1.0] * 7)
    close(Surprisal()(tokens([-1.0], [-1.0]), 0.1).weight, [1.0])


COV_LOGPROB, COV_ADVANTAGES = [-1.0, -2.0, -3.0, -6.0], [3.0, 1.0, -1.0, -3.0]
# Means are 0 and -3, so cov is 3 * 2, 1 * 1, -1 * 0, -3 * -3 = 6, 1, 0, 9.


def test_clip_cov() -> None:
    batch = tokens(COV_LOGPROB, COV_ADVANTAGES)
    plan = ClipCov(share=0.5, low=0.5, high=7.0)(batch, 0.0)  # two of four, and just 6 and 1 lie between the bounds
    close(plan.weight, [0.0, 0.0, 1.0, 1.0])
    plain(plan, batch, "weight")
    close(ClipCov(share=0.5, low=1.0, high=7.0)(batch, 0.0).weight, [0.0, 1.0, 1.0, 1.0])  # 1 is not above 1
    close(ClipCov(share=0.5, low=0.5, high=6.0)(batch, 0.0).weight, [1.0, 0.0, 1.0, 1.0])  # 6 is not below 6
    close(ClipCov()(batch, 0.0).weight, [1.0, 1.0, 1.0, 1.0])  # nothing in (1, 5)


@pytest.mark.parametrize("seed", range(6))
def test_clip_cov_draws_at_random_among_the_eligible(seed: int) -> None:
    batch = tokens(COV_LOGPROB, COV_ADVANTAGES, seed=seed)
    numbers = uniform(torch.arange(4), seed)[[0, 1, 3]]  # the eligible ones; a quarter of four tokens is one
    expected = [1.0] * 4
    expected[[0, 1, 3][int(numbers.argmax())]] = 0.0
    close(ClipCov(share=0.25, low=0.5, high=10.0)(batch, 0.0).weight, expected)


def test_clip_cov_draws_everyone_sooner_or_later() -> None:
    rule, batch = ClipCov(share=0.25, low=0.5, high=10.0), tokens(COV_LOGPROB, COV_ADVANTAGES)
    drawn = {int(rule(replace(batch, seed=seed), 0.0).weight.argmin()) for seed in range(40)}
    assert drawn == {0, 1, 3}


def test_kl_cov() -> None:
    batch = tokens(COV_LOGPROB, COV_ADVANTAGES)
    plan = KlCov(share=0.5, coefficient=0.7)(batch, 0.0)  # the two largest of 6, 1, 0, 9
    close(plan.penalty, [0.7, 0.0, 0.0, 0.7])
    plain(plan, batch, "penalty")
    close(KlCov()(batch, 0.0).penalty, [0.0, 0.0, 0.0, 1.0])  # 0.0008 of a token: at least one


def test_top_entropy() -> None:
    batch = tokens([-1.0] * 10, [1.0] * 10, [0.0, 0.3, 0.9, 0.0, 0.3, 0.2, 0.0, 0.1, 0.0, 0.0])
    plan = TopEntropy()(batch, 0.0)  # a fifth of ten: 0.9 and the first of the two 0.3
    close(plan.weight, [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    plain(plan, batch, "weight")
    assert TopEntropy(share=0.7)(batch, 0.0).weight.sum() == 7  # though just five entropies are not 0


def test_random_positives() -> None:
    batch = tokens([-1.0] * 6, [1.0, 1.0, -1.0, 0.0, 2.0, 3.0], seed=5)
    plan = RandomPositives(share=0.5)(batch, 0.0)  # half of six tokens: three of the four positives
    plain(plan, batch, "weight")
    numbers = uniform(torch.arange(6), 5)[[0, 1, 4, 5]]
    kept = [0, 1, 4, 5][int(numbers.argmin())]
    close(plan.weight, [float(place in (2, 3, kept)) for place in range(6)])
    close(RandomPositives(share=1.0)(batch, 0.0).weight, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0])


def test_nucleus_bonus() -> None:
    batch = tokens([-1.0] * 5, [1.0] * 5, nucleus=[0.5, 0.25, 2.0, 0.0, 1.0])
    plan = NucleusBonus(share=0.4)(batch, 0.0)  # two of five tokens, 2.0 and 1.0, weigh 5 / 2 each
    close(plan.bonus, [0.0, 0.0, 2.5, 0.0, 2.5])
    plain(plan, batch, "bonus")
    assert masked_nucleus_entropy(batch, 0.4) == 1.5  # (2.0 + 1.0) / 2
    assert plan.bonus is not None
    assert batch.nucleus_entropy is not None
    assert (plan.bonus * batch.nucleus_entropy).mean() == 1.5


def test_nucleus_entropy_is_needed_in_words() -> None:
    batch = tokens([-1.0], [1.0])
    for call in (lambda: NucleusBonus()(batch, 0.0), lambda: masked_nucleus_entropy(batch)):
        with pytest.raises(RLVRError, match=r"nucleus_entropy of the rollout batch is None .* with nucleus=0.8"):
            call()
    with pytest.raises(RLVRError, match="nucleus entropy over is 0"):
        masked_nucleus_entropy(tokens([-1.0], [1.0], nucleus=[1.0]), 0)


def test_entropy_advantage() -> None:
    batch = tokens([-1.0] * 6, [1.0, 1.0, -1.0, -1.0, 0.0, 0.0], [0.5, 3.0, 0.5, 3.0, 3.0, -1e-9])
    # Shifts: 0.4 * 0.5 = 0.2; 0.4 * 3 = 1.2 held at 1 / 2; the same at A = -1; 0 where A = 0.
    plan = EntropyAdvantage()(batch, 0.0)
    close(plan.advantages, [1.2, 1.5, -0.8, -0.5, 0.0, 0.0])
    plain(plan, batch, "advantages")
    assert not plan.advantages[5].signbit()
    close(EntropyAdvantage(alpha=1.0, kappa=1.0)(batch, 0.0).advantages, [1.5, 2.0, -0.5, 0.0, 0.0, 0.0])


def test_low_prob_positives() -> None:
    logprob = [-1.0, -5.0, -2.0, -4.0, -3.0, -0.5, -0.1, -3.0, -0.2, -2.0, -9.0, -8.0]
    batch = tokens(logprob, [2.0] * 5 + [-1.0] * 5 + [0.0] * 2, row=[7] * 5 + [3] * 5 + [5] * 2)
    # Two fifths: the two least likely of row 7 (-5, -4), the two likeliest of row 3 (-0.1, -0.2), none where A = 0.
    plan = LowProbPositives(share=0.4)(batch, 1.5)
    close(plan.advantages, [2.0, 3.0, 2.0, 3.0, 2.0, -1.0, -1.5, -1.0, -1.5, -1.0, 0.0, 0.0])
    plain(plan, batch, "advantages")
    close(LowProbPositives()(batch, 1.0).advantages, batch.advantages.tolist())
    # A row of two has 0.4 of a token in a fifth: at least one.
    short = tokens([-1.0, -2.0, -1.0, -2.0], [1.0, 1.0, -1.0, -1.0], row=[0, 0, 1, 1])
    close(LowProbPositives()(short, 2.0).advantages, [1.0, 2.0, -2.0, -1.0])


def test_steer() -> None:
    half, most = math.log(0.5), math.log(0.9)
    batch = tokens([half, half, most, half], [1.0, -2.0, 1.0, 0.0], [0.0, math.log(2) + 0.3, 0.5, 1.0])
    # Omega: 1 * 0.5 * ln 2, then 2 * 0.5 * 0.3 = 0.3, then 0.1 * (ln 0.9 + 0.5), and 0 where A = 0.
    omega = [0.5 * math.log(2), 0.3, 0.1 * (most + 0.5), 0.0]
    decay = -math.log(0.8) / omega[0]  # the first is the largest and above the floor, so it weighs 0.8
    plan = Steer()(batch, 0.0)
    close(plan.weight, [0.8, math.exp(-decay * 0.3), math.exp(-decay * omega[2]), 1.0])
    plain(plan, batch, "weight")
    linear = Steer(form="linear")(batch, 0.0)
    close(linear.weight, [0.8, 1.2 - 0.4 * 0.3 / omega[0], 1.2 - 0.4 * omega[2] / omega[0], 1.2])


def test_steer_of_small_and_of_equal_changes() -> None:
    small = tokens([math.log(0.5)] * 2, [0.01, 0.01], [math.log(2) + 0.8] * 2)
    # Omega is 0.01 * 0.5 * 0.8 = 0.004 twice: below the floor, so 0.8 ** (0.004 / 0.02); the linear form goes half-way.
    close(Steer()(small, 0.0).weight, [0.8**0.2] * 2)
    close(Steer(form="linear", weight_min=0.7, weight_max=1.1)(small, 0.0).weight, [0.9] * 2)


def test_log_prob_advantage() -> None:
    batch = tokens([-1.0, -4.0, -1.0, -4.0, -4.0], [2.0, 2.0, -2.0, -2.0, 0.0])
    # zeta = 0.3: 2 * 1.3, 2 * 2.2, -2 * 0.7, and -2 * (1 - 1.2) held at 0.
    plan = LogProbAdvantage()(batch, 0.3)
    close(plan.advantages, [2.6, 4.4, -1.4, 0.0, 0.0])
    plain(plan, batch, "advantages")
    close(LogProbAdvantage()(batch, 0.0).advantages, batch.advantages.tolist())


@pytest.mark.parametrize(
    ("rule", "gain", "words"),
    [
        (ConfidentSigns(), 1.1, "EntroPIC's token rule is 1.1 but lies in .-1, 1."),
        (Surprisal(both_signs=True), 1.1, "STARE's token rule is 1.1 but lies in .-1, 1."),
        (Surprisal(), math.inf, "STARE's token rule is inf"),
        (Surprisal(), -1.1, "STARE's token rule is -1.1"),
        (LowProbPositives(), 0.9, "A3PO's token rule is 0.9 but lies in .1, inf."),
        (LogProbAdvantage(), -0.1, "REPO-R's token rule is -0.1 but lies in .0, inf."),
        (LogProbAdvantage(), math.nan, "REPO-R's token rule is nan"),
    ],
)
def test_a_gain_out_of_range_is_refused(rule: Any, gain: float, words: str) -> None:
    with pytest.raises(RLVRError, match=words):
        rule(tokens([-1.0, -2.0], [1.0, -1.0]), gain)


def test_options_that_break_a_rule_are_refused() -> None:
    shaped: list[dict[str, Any]] = [{"kappa": 0.5}, {"alpha": -0.1}, {"alpha": math.nan}]
    for options in shaped:
        with pytest.raises(RLVRError, match=r"kappa .* the paper uses 2 and 0.4"):
            EntropyAdvantage(**options)
    weighted: list[dict[str, Any]] = [{"weight_min": 0.0}, {"weight_max": 0.9}, {"omega_floor": 0.0}]
    for options in weighted:
        with pytest.raises(RLVRError, match=r"the released code uses 0.8, 1.2 and 0.02"):
            Steer(**options)
    with pytest.raises(RLVRError, match="form of STEER's weights is 'cubic'"):
        Steer(form="cubic")  # type: ignore[arg-type]
    for threshold in (0.0, 1.0, math.nan):
        with pytest.raises(RLVRError, match=r"threshold of EntroPIC's token rule is .* \(0, 1\)"):
            ConfidentSigns(threshold)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    batch = tokens([-1.0, -2.0], [1.0, -1.0])
    with pytest.raises(RLVRError, match="advantages of 1 of 2 response tokens is NaN or infinite"):
        replace(batch, advantages=torch.tensor([1.0, torch.nan]))
    with pytest.raises(RLVRError, match="logprob of 2 of 2 response tokens"):
        replace(batch, logprob=torch.tensor([-torch.inf, -torch.inf]))
    with pytest.raises(RLVRError, match="no response tokens"):
        select(make_batch(), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"entropy must hold detached floats of shape \[2\]"):
        replace(batch, entropy=torch.zeros(3))
    with pytest.raises(ValueError, match="advantages must hold detached floats"):
        replace(batch, advantages=torch.tensor([1, -1]))
    with pytest.raises(ValueError, match="logprob must hold detached floats"):
        replace(batch, logprob=torch.zeros(2, requires_grad=True))
    with pytest.raises(ValueError, match="index must be int64"):
        replace(batch, index=torch.arange(2, dtype=torch.int32))


def fields_of(plan: TokenPlan) -> list[torch.Tensor]:
    return [part for part in (plan.advantages, plan.weight, plan.penalty, plan.bonus) if part is not None]


REALS = st.floats(-1e4, 1e4, width=32)


@given(
    token=st.lists(
        st.tuples(
            st.floats(-1e3, 2.0**-20, width=32), REALS | st.sampled_from([0.0, -0.0, 2.0**-149]), st.floats(-1e-6, 15)
        ),
        min_size=1,
        max_size=12,
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kappa=st.sampled_from([1.0, 1.0000001, 2.0]),
)
def test_no_rule_flips_a_sign_and_weights_are_finite_and_not_negative(
    token: list[tuple[float, float, float]], dtype: torch.dtype, kappa: float
) -> None:
    logprob, advantages, entropy = (torch.tensor(values, dtype=dtype) for values in zip(*token, strict=True))
    index = torch.arange(len(token))
    batch = TokenBatch(logprob, entropy, advantages, index // 3, index, nucleus_entropy=entropy.abs())
    rules = dict(RULES)
    rules["entropy_advantage"] = (EntropyAdvantage(kappa=kappa), 0.0)
    rules["confident_low"], rules["confident_high"] = (ConfidentSigns(), -1.0), (ConfidentSigns(), 1.0)
    rules["log_prob_strong"] = (LogProbAdvantage(), 50.0)
    for name, (rule, gain) in rules.items():
        plan = rule(batch, gain)
        for part in fields_of(plan):
            assert part.dtype == dtype, name
            assert part.shape == advantages.shape, name
            assert part.isfinite().all(), name
        assert (plan.advantages.sign() * advantages.sign() >= 0).all(), name
        assert (plan.advantages[advantages == 0] == 0).all(), name
        for part in fields_of(plan)[1:]:
            assert (part >= 0).all(), name


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Three gloo processes, started once; element r is what rank r saved."""
    out = tmp_path_factory.mktemp("token_ranks")
    multiprocessing.set_forkserver_preload(["token_shards"])  # torch is imported once instead of three times
    arguments = (str(out / "store"), str(out))
    start_processes(run_rank, arguments, nprocs=3, start_method="forkserver")  # type: ignore[no-untyped-call]
    return [torch.load(Path(out) / f"rank{rank}.pt", weights_only=False) for rank in range(3)]


def assert_same(name: str, got: TokenPlan, whole: TokenPlan) -> None:
    """Plans over the same tokens: the same bits where tokens are chosen, and to rounding where they are weighted."""
    for part, truth in zip(fields_of(got), fields_of(whole), strict=True):
        assert part.dtype == truth.dtype
        if name in SELECTIONS or name.startswith(("confident", "low_prob")):
            assert torch.equal(part, truth), name
        else:
            tolerance = 1e-12 if part.dtype == torch.float64 else 1e-7
            torch.testing.assert_close(part, truth, rtol=tolerance, atol=0.0)


def pick(plan: TokenPlan, place: torch.Tensor) -> TokenPlan:
    """The plan of the tokens at ``place``, in that order."""
    penalty, bonus = (None if part is None else part[place] for part in (plan.penalty, plan.bonus))
    return TokenPlan(plan.advantages[place], plan.weight[place], penalty, bonus)


def test_the_shared_batch_makes_every_rule_choose() -> None:
    batch = make_batch()
    for name, (rule, gain) in RULES.items():
        plan = rule(batch, gain)
        if name != "uniform":
            ones = torch.ones_like(batch.advantages)
            usual = [batch.advantages, ones, 0 * ones, ones]
            parts = [plan.advantages, plan.weight, plan.penalty, plan.bonus]
            changed = [part != by for part, by in zip(parts, usual, strict=True) if part is not None]
            assert torch.stack(changed).any(dim=0).sum() >= 3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_of_tokens_does_not_matter(dtype: torch.dtype) -> None:
    whole = make_batch(dtype)
    order = torch.randperm(len(whole.index), generator=torch.Generator().manual_seed(1))
    turned = select(whole, order)
    for name, (rule, gain) in RULES.items():
        assert_same(name, rule(turned, gain), pick(rule(whole, gain), order))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_plan_what_one_would(results: Results, ranks: int, dtype: torch.dtype) -> None:
    whole = make_batch(dtype)
    sizes = [len(place) for place in places(whole, ranks)]
    assert sum(sizes) == len(whole.index)
    assert ranks == 2 or sizes[1] == 0  # one of three ranks has no tokens
    truth = run_on(whole, special_values())
    for rank, place in enumerate(places(whole, ranks)):
        got = results[rank][ranks, dtype]
        assert torch.equal(got["index"], whole.index[place])
        for name in RULES:
            mine = pick(truth[name], place)
            assert_same(name, got[name], mine)
        assert got["scalars"] == truth["scalars"]  # bit for bit
        assert torch.equal(got["kth"], truth["kth"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_refuse_together(results: Results, ranks: int) -> None:
    for rank in range(ranks):
        got = results[rank][ranks, torch.float32]
        assert got["nan"].startswith("1 of 20 token values are NaN")
        assert got["twins"].startswith(f"{ranks} response tokens have the global index 0;")
        assert got["batch"].startswith("logprob of ")
