"""Nucleus entropy on one rank: against a float64 sort and autograd, ties, hostile logits, all three functions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from head_shards import NUCLEUS, Result, by_autograd, make_problem, nucleus_of, run, siren
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vocab_shards import make_case, oracle, with_nucleus

from megatron_rlvr.vocab import TokenExtras, TokenStats, linear_policy_loss, linear_token_stats, token_stats
from megatron_rlvr.vocab.nucleus import lowest_logits

INF = math.inf
HOWS = ("sweep", "two_pass", "stats")


def undecided(scaled: torch.Tensor, share: float, margin: float) -> bool:
    """Whether rounding may decide if some token belongs to a nucleus."""
    ordered, _ = scaled.double().sort(dim=-1, descending=True)
    ends = torch.cat([ordered[:, 1:] != ordered[:, :-1], torch.ones(len(scaled), 1, dtype=torch.bool)], dim=1)
    mass = ordered.softmax(-1).cumsum(-1)
    return bool(((mass - share).abs() < margin)[ends].any()) and share < 1.0


@given(
    rows=st.integers(0, 7),
    vocab=st.integers(1, 40),
    scale=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    ties=st.booleans(),
    impossible=st.sets(st.integers(1, 39), max_size=20),
    share=st.one_of(st.floats(1e-3, 1.0), st.sampled_from([0.5, 0.8, 1.0])),
    temperatures=st.booleans(),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=150, deadline=None)
def test_equals_a_sort_and_autograd(
    rows: int,
    vocab: int,
    scale: float,
    ties: bool,
    impossible: set[int],
    share: float,
    temperatures: bool,
    padding: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocab + padding, generator=generator, dtype=torch.float64)
    logits = logits.round() if ties else logits
    logits[:, [column for column in impossible if column < vocab]] = -INF
    logits[:, vocab:] = 1e6
    temperature = torch.linspace(0.3, 3.0, rows).double() if temperatures else 0.7
    tau = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    assume(not undecided(logits[:, :vocab] / tau, share, 1e-12))
    case = with_nucleus(make_case(logits, temperature, vocab, seed), share)
    leaf, truth = logits.clone().requires_grad_(), oracle(case)
    stats = token_stats(leaf, case.targets, temperature=temperature, vocab_size=vocab, nucleus=share)
    torch.testing.assert_close(stats.nucleus_entropy, truth.nucleus_entropy, rtol=1e-12, atol=1e-12)
    torch.autograd.backward(stats.differentiable(), (case.grad_logprob, case.grad_entropy, case.grad_nucleus))
    torch.testing.assert_close(leaf.grad, truth.grad, rtol=1e-11, atol=1e-11)
    assert not leaf.grad[:, vocab:].any()


FINITE = {"allow_nan": False, "allow_infinity": False}


@given(
    values=st.lists(st.floats(width=32, **FINITE), min_size=1, max_size=30),
    near=st.floats(-50, 50, width=32),
    share=st.floats(1e-3, 0.999),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    spread=st.sampled_from([1.0, 1e-5, 1e5]),
)
@settings(max_examples=200, deadline=None)
def test_the_search_finds_the_very_float(
    values: list[float], near: float, share: float, dtype: torch.dtype, spread: float
) -> None:
    # Beside floats of every exponent, a crowd that shares its leading digits.
    crowd = near + spread * torch.linspace(-1.0, 1.0, 20, dtype=dtype)
    row = torch.cat([torch.tensor(values, dtype=dtype).clamp(-1e30, 1e30), crowd])[None]
    tau = row.abs().max().clamp(min=1.0)[None] / 8.0
    ordered = row.sort(dim=1, descending=True).values
    mass = ((ordered - ordered[:, :1]) / tau).exp().double().cumsum(1)
    target = share * mass[:, -1:]
    assume(bool(((mass - target).abs() > 1e-12 * mass[:, -1:]).all()))
    expected = ordered.gather(1, (mass < target).sum(1, keepdim=True))
    found = lowest_logits(lambda: [(slice(0, 1), row)], ordered[:, 0], tau, share, None)
    assert found.item() == expected.item()


@pytest.mark.parametrize(
    ("row", "share", "entropy"),
    [
        pytest.param([0.0] * 4, 0.3, math.log(4), id="all-tie"),
        pytest.param([math.log(0.5), math.log(0.25), math.log(0.25), -INF], 0.4, 0.0, id="one-token-is-enough"),
        pytest.param(
            [math.log(0.5), math.log(0.25), math.log(0.25), -INF], 0.6, 1.5 * math.log(2), id="tie-at-the-end"
        ),
        pytest.param([0.0, -0.0, -1.0, -1.0], 0.3, math.log(2), id="two-zeros-tie"),
        pytest.param([1e4, 1e4, -1e4, -1e4], 0.9, math.log(2), id="far-apart"),
        pytest.param([-1e4, -1e4 - 1, -1e4 - 1, -1e4 - 30], 0.3, 0.0, id="all-far-below-zero"),
        pytest.param([-INF, 3.0, -INF, -INF], 0.8, 0.0, id="one-possible-token"),
        pytest.param([-INF, 3.0, -INF, -INF], 1.0, 0.0, id="one-possible-token-whole"),
    ],
)
@pytest.mark.parametrize("target", [0, 1, 3, -100])
def test_closed_forms(row: list[float], share: float, entropy: float, target: int) -> None:
    ordinary = [1.0, 2.0, 3.0, 4.0]
    logits = torch.tensor([ordinary, row, ordinary], requires_grad=True)
    found = token_stats(logits, torch.tensor([1, target, 1]), nucleus=share).nucleus_entropy
    assert found is not None
    assert found[1].item() == pytest.approx(entropy, rel=1e-6, abs=1e-12)
    torch.autograd.backward(found.sum())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[logits.isinf()].any()
    torch.testing.assert_close(logits.grad[0], logits.grad[2])


@pytest.mark.parametrize("poison", [[-INF] * 4, [math.nan, 0.0, 0.0, 0.0], [INF, 0.0, 0.0, 0.0]])
def test_rows_without_a_distribution_stay_alone(poison: list[float]) -> None:
    clean = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    logits = torch.cat([clean, torch.tensor([poison]), clean]).requires_grad_()
    found = token_stats(logits, torch.tensor([1, 1, 1]), nucleus=0.8).nucleus_entropy
    assert found is not None
    assert found.isnan().tolist() == [False, True, False]
    torch.autograd.backward(found, torch.ones(3))
    assert logits.grad is not None
    assert logits.grad[[0, 2]].isfinite().all()
    assert poison[0] != -INF or not logits.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_whole_row_is_the_entropy_itself(dtype: torch.dtype) -> None:
    values = (5.0 * torch.randn(40, 700, generator=torch.Generator().manual_seed(1))).to(dtype)
    targets, upstream = torch.zeros(40, dtype=torch.long), torch.linspace(-1.0, 1.0, 40)
    logits = values.clone().requires_grad_()
    stats = token_stats(logits, targets, nucleus=1.0, temperature=0.9)
    assert stats.nucleus_entropy is not None
    assert torch.equal(stats.nucleus_entropy, stats.entropy)
    upstream = upstream.to(stats.entropy.dtype)
    (cut,) = torch.autograd.grad(stats.nucleus_entropy, logits, upstream, retain_graph=True)
    (whole,) = torch.autograd.grad(stats.entropy, logits, upstream)
    assert torch.equal(cut, whole)


@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_gradient_lives_on_the_nucleus_alone(share: float) -> None:
    logits = 3.0 * torch.randn(30, 200, generator=torch.Generator().manual_seed(2))
    logits.requires_grad_()
    found = token_stats(logits, torch.zeros(30, dtype=torch.long), nucleus=share).nucleus_entropy
    assert found is not None
    (grad,) = torch.autograd.grad(found.sum(), logits)
    ordered = logits.detach().double().softmax(-1).sort(-1, descending=True).values
    sizes = 1 + (ordered.cumsum(-1) < share).sum(-1)
    assert torch.equal((grad != 0).sum(-1)[sizes > 1], sizes[sizes > 1])
    torch.testing.assert_close(grad.sum(-1), torch.zeros(30), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(found.double(), nucleus_of(logits.double(), share), rtol=2e-6, atol=1e-6)


def assert_equal(got: Result, truth: Result, tolerance: float) -> None:
    for name in ("loss", "logprob", "entropy", "grad_hidden", "grad_weight"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(truth, name).double(), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("share", [0.2, NUCLEUS, 1.0])
@pytest.mark.parametrize("how", HOWS)
def test_sweep_and_two_passes_equal_autograd(how: str, share: float) -> None:
    problem = make_problem(temperature=torch.linspace(0.5, 2.0, 23).double(), vocab_size=17, nucleus=share)
    assert_equal(run(problem, siren, how), by_autograd(problem, siren), 1e-12)


@given(
    tokens=st.integers(1, 12),
    vocab=st.integers(1, 30),
    padding=st.integers(0, 4),
    chunk_rows=st.integers(1, 13),
    share=st.floats(0.05, 1.0),
    how=st.sampled_from(HOWS),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_chunk(
    tokens: int, vocab: int, padding: int, chunk_rows: int, share: float, how: str, seed: int
) -> None:
    problem = make_problem(seed=seed, tokens=tokens, vocab=vocab + padding, vocab_size=vocab, nucleus=share)
    assume(not undecided((problem.hidden @ problem.weight.T)[:, :vocab], share, 1e-12))
    got = run(problem, siren, how, chunk_rows=chunk_rows)
    assert_equal(got, by_autograd(problem, siren), 1e-10)
    assert not got.grad_weight[vocab:].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("how", ["sweep", "stats"])
def test_dtypes_of_the_head(how: str, dtype: torch.dtype, tolerance: float) -> None:
    problem = make_problem(dtype, nucleus=NUCLEUS)
    got = run(problem, siren, how)
    assert got.grad_hidden.dtype == got.grad_weight.dtype == dtype
    assert_equal(got, by_autograd(problem, siren), tolerance)


@pytest.mark.parametrize("how", HOWS)
def test_tokens_whose_only_gradient_is_the_nucleus_entropys(how: str) -> None:
    problem = make_problem(nucleus=NUCLEUS)
    weights = (torch.arange(23) % 3 == 0).double()

    def alone(stats: TokenStats, _: object, rows: slice) -> torch.Tensor:
        assert stats.nucleus_entropy is not None
        return weights[rows] * stats.nucleus_entropy

    got = run(problem, alone, how)
    assert_equal(got, by_autograd(problem, alone), 1e-12)
    found = nucleus_of(problem.hidden @ problem.weight.T, NUCLEUS)
    assert got.grad_hidden.any(dim=1).tolist() == ((weights > 0) & (found > 0)).tolist()


def test_reused_logits_receive_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    values, targets = torch.randn(50, 30, generator=torch.Generator().manual_seed(4)), torch.arange(50) % 30
    monkeypatch.setattr("megatron_rlvr.vocab.logits._BLOCK_BYTES", 1)  # several blocks
    grads = []
    for reuse in (False, True):
        leaf = values.clone().requires_grad_()
        stats = token_stats(leaf * 1.0, targets, vocab_size=28, nucleus=0.8, reuse_logits=reuse)
        assert stats.nucleus_entropy is not None
        loss = stats.nucleus_entropy.square().sum() + stats.logprob[:20].sum() - stats.entropy.sum()
        grads += torch.autograd.grad(loss, leaf)
    assert torch.equal(*grads)


def test_extras_beside_it_and_nothing_unless_asked_for() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    targets = torch.arange(5)
    plain = linear_token_stats(hidden, weight, targets, extras=True)
    assert plain.nucleus_entropy is None
    both = linear_token_stats(hidden, weight, targets, extras=True, nucleus=0.5)
    direct = token_stats(hidden @ weight.T, targets, extras=True, nucleus=0.5)
    torch.testing.assert_close(both.nucleus_entropy, direct.nucleus_entropy)
    for name in TokenExtras.__slots__:
        assert torch.equal(getattr(both.extras, name), getattr(plain.extras, name))
        assert not getattr(direct.extras, name).requires_grad

    def token_loss(stats: TokenStats, rows: slice) -> torch.Tensor:
        torch.testing.assert_close(stats.nucleus_entropy, direct.nucleus_entropy[rows])
        assert stats.extras is not None
        return stats.logprob

    linear_policy_loss(hidden, weight, targets, token_loss, extras=True, nucleus=0.5, chunk_rows=2)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, math.nan])
def test_a_share_outside_the_unit_interval_is_refused(share: float) -> None:
    problem = dataclasses.replace(make_problem(), nucleus=share)
    for how in HOWS:
        with pytest.raises(ValueError, match=r"nucleus must lie in \(0, 1\]"):
            run(problem, siren, how)
    with pytest.raises(ValueError, match=r"nucleus must lie in \(0, 1\]"):
        token_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), nucleus=share)
