"""token_stats on one rank: against float64, against finite differences, on hostile logits and on misuse."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_shards import Case, make_case, oracle, run_case, shard_state

from megatron_rlvr.vocab import TokenExtras, state, token_stats

INF = math.inf


def exact_entropy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Entropy in float64, summed around the maximum, so that it is itself exact for almost certain rows."""
    gaps = (logits.double() - logits.double().max(dim=-1, keepdim=True).values) / temperature
    gaps, _ = gaps.sort(dim=-1)
    rest = gaps[:, :-1].exp().sum(dim=-1)
    return rest.log1p() - (gaps * gaps.exp()).sum(dim=-1) / (1.0 + rest)


def peaked_logits(vocab: int, offset: float) -> torch.Tensor:
    """Rows whose entropies run from about 7 nats (where the vocabulary allows) down to below 1e-8."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(256, vocab, generator=generator)
    logits[torch.arange(256), torch.arange(256) % vocab] += torch.linspace(0.0, 32.0, 256)
    return logits + offset


def relative_error(entropy: torch.Tensor, truth: torch.Tensor) -> float:
    """Worst relative error over rows whose true entropy is at least 1e-8."""
    rows = truth >= 1e-8
    assert truth[rows].min() < 1e-6
    return float(((entropy.double() - truth).abs() / truth)[rows].max())


@pytest.mark.parametrize("offset", [0.0, 300.0, 1e4, -1e4])
@pytest.mark.parametrize(("vocab", "temperature", "limit"), [(4096, 1.0, 1e-6), (4096, 0.7, 1e-6), (3, 0.7, 2e-6)])
def test_relatively_exact_down_to_an_entropy_of_1e_8(
    vocab: int, temperature: float, limit: float, offset: float
) -> None:
    logits = peaked_logits(vocab, offset)
    stats = token_stats(logits, torch.zeros(256, dtype=torch.long), temperature=temperature)
    assert relative_error(stats.entropy, exact_entropy(logits, temperature)) <= limit
    logprob = (logits.double() / temperature).log_softmax(dim=-1)[:, 0]
    torch.testing.assert_close(stats.logprob.double(), logprob, rtol=3e-7, atol=1e-7)


def test_the_entropy_test_rejects_textbook_formulas() -> None:
    logits = peaked_logits(4096, 0.0)
    truth = exact_entropy(logits)
    log_z = logits.logsumexp(dim=-1)
    assert relative_error(log_z - (logits.softmax(dim=-1) * logits).sum(dim=-1), truth) > 0.5
    logp = logits.log_softmax(dim=-1)
    assert relative_error(-(logp.exp() * logp).sum(dim=-1), truth) > 1e-3


def test_logprob_of_an_almost_certain_token_keeps_its_digits() -> None:
    gaps = torch.tensor([5.0, 10.0, 16.0, 18.0])
    logits = torch.stack([gaps, torch.zeros(4)], dim=1)
    logprob = token_stats(logits, torch.zeros(4, dtype=torch.long)).logprob
    torch.testing.assert_close(logprob.double(), -torch.log1p((-gaps.double()).exp()), rtol=3e-7, atol=0.0)


def test_gradient_of_an_almost_certain_token_keeps_its_digits() -> None:
    logits = torch.tensor([[18.0, 0.0]], requires_grad=True)
    torch.autograd.backward(token_stats(logits, torch.tensor([0])).logprob)
    assert logits.grad is not None
    other = 1.0 / (1.0 + math.exp(18.0))
    torch.testing.assert_close(logits.grad[0].double(), torch.tensor([other, -other]).double(), rtol=1e-6, atol=0.0)


@given(
    rows=st.integers(0, 7),
    vocab=st.integers(1, 40),
    scale=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    temperature=st.floats(0.2, 5.0),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_matches_float64_autograd(
    rows: int, vocab: int, scale: float, temperature: float, padding: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocab + padding, generator=generator, dtype=torch.float64)
    logits[:, vocab:] = 1e6  # padding that would win every maximum
    case = make_case(logits, temperature, vocab, seed)
    got, truth = run_case(case), oracle(case)
    torch.testing.assert_close(got.logprob, truth.logprob, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.entropy, truth.entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.grad, truth.grad, rtol=1e-11, atol=1e-11)
    assert not got.grad[:, vocab:].any()


@given(
    cuts=st.lists(st.integers(0, 24), min_size=0, max_size=4),
    masked=st.sets(st.integers(0, 23), max_size=23),
    temperature=st.floats(0.2, 5.0),
    offset=st.sampled_from([0.0, 1e4, -1e4]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_merging_any_shards_equals_one_pass(
    cuts: list[int], masked: set[int], temperature: float, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(5, 24, generator=generator, dtype=torch.float64) + offset
    logits[:, sorted(masked)] = -INF
    targets = torch.randint(24, (5,), generator=generator)
    tau = torch.full((5,), temperature, dtype=torch.float64)
    bounds = [0, *sorted(cuts), 24]
    merged: state.RowState | None = None
    for start, end in itertools.pairwise(bounds):
        part = shard_state(logits[:, start:end], targets - start, tau)
        merged = part if merged is None else state.merge(merged, part, tau)
    assert merged is not None
    got, whole = state.finish(merged, tau), state.finish(shard_state(logits, targets, tau), tau)
    torch.testing.assert_close(got.logprob, whole.logprob, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.entropy, whole.entropy, rtol=1e-12, atol=1e-15)
    assert got.extras is not None
    assert whole.extras is not None
    for name in TokenExtras.__slots__:
        torch.testing.assert_close(
            getattr(got.extras, name), getattr(whole.extras, name), rtol=1e-9, atol=1e-12, msg=name
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)])
def test_gradcheck_of_both_outputs(temperature: float | torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 9, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([0, 3, 6, 2])

    def outputs(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stats = token_stats(z, targets, temperature=temperature, vocab_size=7)
        return stats.logprob, stats.entropy

    assert torch.autograd.gradcheck(outputs, (logits,))


@pytest.mark.parametrize(
    ("row", "target", "logprob", "entropy"),
    [
        pytest.param([0.0, 0.0, 0.0, 0.0], 2, -math.log(4), math.log(4), id="uniform"),
        pytest.param([5.0, -INF, -INF, -INF], 0, 0.0, 0.0, id="one-possible-token"),
        pytest.param([-INF, 1.0, 1.0, -INF], 1, -math.log(2), math.log(2), id="tied-maximum-beside-inf"),
        pytest.param([1e4, 1e4, -1e4, -1e4], 0, -math.log(2), math.log(2), id="offset-up-and-down"),
        pytest.param([-1e4, -1e4, -1e4, -1e4], 3, -math.log(4), math.log(4), id="all-far-below-zero"),
        pytest.param([0.0, -INF, 0.0, 0.0], 1, -INF, math.log(3), id="impossible-target"),
        pytest.param([0.0, torch.finfo(torch.float32).min, 0.0, 0.0], 0, -math.log(3), math.log(3), id="finfo-min"),
        pytest.param([0.0, 0.0, 0.0, 0.0], 4, -INF, math.log(4), id="target-beyond-the-vocabulary"),
        pytest.param([0.0, 0.0, 0.0, 0.0], -100, -INF, math.log(4), id="ignore-index-target"),
        pytest.param([2000.0, 0.0, 0.0, 0.0], 1, -2000.0, 0.0, id="underflowing-target"),
    ],
)
def test_nasty_rows(row: list[float], target: int, logprob: float, entropy: float) -> None:
    ordinary = [1.0, 2.0, 3.0, 4.0]
    logits = torch.tensor([ordinary, row, ordinary], requires_grad=True)
    stats = token_stats(logits, torch.tensor([1, target, 1]))
    assert stats.logprob[1].item() == pytest.approx(logprob, rel=1e-6, abs=1e-12)
    assert stats.entropy[1].item() == pytest.approx(entropy, rel=1e-6, abs=1e-12)
    torch.autograd.backward(stats.logprob.exp().sum() + stats.entropy.sum())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[logits.isinf()].any()
    torch.testing.assert_close(logits.grad[0], logits.grad[2])
    alone = run_case(
        Case(logits.detach()[:1], torch.tensor([1]), 1.0, None, stats.logprob[:1].detach().exp(), torch.ones(1))
    )
    torch.testing.assert_close(logits.grad[:1], alone.grad)


@pytest.mark.parametrize("poison", [[-INF] * 4, [math.nan, 0.0, 0.0, 0.0], [INF, 0.0, 0.0, 0.0]])
def test_rows_without_a_distribution_stay_alone(poison: list[float]) -> None:
    clean = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2)
    logits = torch.cat([clean[:1], torch.tensor([poison]), clean[1:]]).requires_grad_()
    stats = token_stats(logits, torch.tensor([1, 1, 1]))
    assert stats.entropy[1].isnan()
    assert stats.logprob[1] == -INF if poison[0] == -INF else stats.logprob[1].isnan()
    assert stats.entropy[[0, 2]].isfinite().all()
    torch.autograd.backward([stats.logprob, stats.entropy], [torch.ones(3), torch.ones(3)])
    assert logits.grad is not None
    assert logits.grad[[0, 2]].isfinite().all()
    assert poison[0] != -INF or not logits.grad[1].any()


def test_a_target_on_a_padding_column_is_impossible() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    stats = token_stats(logits, torch.tensor([1, 3]), vocab_size=3)
    assert stats.logprob.tolist() == pytest.approx([-math.log(3), -INF])
    torch.autograd.backward(stats.logprob, torch.ones(2))
    assert logits.grad is not None
    assert not logits.grad[1].any()
    assert not logits.grad[:, 3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    case = make_case(torch.randn(6, 50, generator=generator).to(dtype))
    got, truth = run_case(case), oracle(case)
    assert got.grad.dtype == dtype
    assert got.logprob.dtype == got.entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tight = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got.logprob.double(), truth.logprob, rtol=tight, atol=tight)
    torch.testing.assert_close(got.entropy.double(), truth.entropy, rtol=tight, atol=tight)
    rounding = max(tight, torch.finfo(dtype).eps)
    torch.testing.assert_close(got.grad.double(), truth.grad, rtol=rounding, atol=1e-7)


def test_blocks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    case = make_case(torch.randn(300, 20, generator=generator), temperature=torch.linspace(0.5, 2.0, 300))
    whole = run_case(case)
    monkeypatch.setattr("megatron_rlvr.vocab.logits._BLOCK_BYTES", 1)
    blocked = run_case(case)
    assert torch.equal(whole.logprob, blocked.logprob)
    assert torch.equal(whole.entropy, blocked.entropy)
    assert torch.equal(whole.grad, blocked.grad)


def test_one_output_may_go_unused_and_the_input_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    case = make_case(torch.randn(4, 6, generator=generator))
    logits = case.logits.clone().requires_grad_()
    torch.autograd.backward(token_stats(logits, case.targets).entropy, case.grad_entropy)
    assert logits.grad is not None
    truth = oracle(Case(case.logits, case.targets, 1.0, None, torch.zeros(4), case.grad_entropy))
    torch.testing.assert_close(logits.grad.double(), truth.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits.detach(), case.logits)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, INF])
def test_bad_row_temperature(temperature: float) -> None:
    logits, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="temperature must be positive"):
        token_stats(logits, targets, temperature=temperature)
    if temperature != INF:
        stats = token_stats(logits, targets, temperature=torch.tensor([1.0, temperature]))
        assert stats.logprob.isnan().tolist() == stats.entropy.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, "logits must be a floating"),
        ({"logits": torch.zeros(2, 3, dtype=torch.long)}, "logits must be a floating"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets must be int64"),
        ({"targets": torch.zeros(2, 1, dtype=torch.long)}, "targets must be int64"),
        ({"targets": torch.zeros(2)}, "targets must be int64"),
        ({"targets": torch.zeros(2, dtype=torch.long, device="meta")}, "targets are on meta"),
        ({"temperature": torch.ones(3)}, "temperature must be a number or a tensor"),
        ({"temperature": torch.ones(2, requires_grad=True)}, "detach it"),
        ({"vocab_size": 4}, "vocab_size must lie in 1..3"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"shard": range(4)}, "this rank has 3 columns"),
        ({"shard": range(0, 6, 2)}, "this rank has 3 columns"),
        ({"shard": torch.zeros(3)}, "shard must be int64"),
        ({"backend": "cuda"}, "give 'auto', 'torch' or 'triton'"),
        ({"backend": "triton"}, "backend='triton' cannot run because the tensors are on cpu"),
    ],
)
def test_misuse_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 3), "targets": torch.zeros(2, dtype=torch.long), **change}
    with pytest.raises(ValueError, match=message):
        token_stats(**arguments)  # type: ignore[arg-type]
