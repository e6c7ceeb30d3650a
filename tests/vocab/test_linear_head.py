"""The head from hidden states: one sweep and two passes equal autograd for every objective, and refusals."""

from __future__ import annotations

import pytest
import torch
from head_shards import SEPARABLE, Problem, by_autograd, everything, gspo, make_problem, ppo, ranked, run
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlvr.vocab import TokenStats, linear_policy_loss, linear_token_stats, token_stats
from megatron_rlvr.vocab.head import Head


def assert_equal(got, truth, tolerance: float) -> None:
    for name in ("loss", "logprob", "entropy", "grad_hidden", "grad_weight"):
        torch.testing.assert_close(
            getattr(got, name).double(),
            getattr(truth, name),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("how", ["sweep", "two_pass", "stats"])
@pytest.mark.parametrize("name", sorted(SEPARABLE))
def test_equals_autograd_for_every_objective(name: str, how: str):
    problem = make_problem(temperature=0.8)
    assert_equal(run(problem, SEPARABLE[name], how), by_autograd(problem, SEPARABLE[name]), 1e-12)


@pytest.mark.parametrize("objective", [gspo, ranked])
def test_objectives_of_the_whole_batch_take_two_passes(objective):
    problem = make_problem(seed=1)
    assert_equal(run(problem, objective, "two_pass"), by_autograd(problem, objective), 1e-12)


@given(
    tokens=st.integers(1, 12),
    vocab=st.integers(1, 30),
    padding=st.integers(0, 4),
    chunk_rows=st.integers(1, 13),
    how=st.sampled_from(["sweep", "two_pass", "stats"]),
    temperatures=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_chunk_and_temperature(
    tokens: int, vocab: int, padding: int, chunk_rows: int, how: str, temperatures: bool, seed: int
):
    temperature = torch.linspace(0.5, 2.0, tokens).double() if temperatures else 1.0
    problem = make_problem(seed=seed, tokens=tokens, vocab=vocab + padding, vocab_size=vocab, temperature=temperature)
    got = run(problem, everything, how, chunk_rows=chunk_rows)
    assert_equal(got, by_autograd(problem, everything), 1e-10)
    assert not got.grad_weight[vocab:].any()


@pytest.mark.parametrize("how", ["sweep", "two_pass", "stats"])
def test_only_the_given_rows_enter(how: str):
    problem = make_problem(rows=torch.tensor([4, 21, 0, 9]))
    problem.hidden[1] = torch.nan  # a row that stays outside reaches nothing
    truth = by_autograd(
        Problem(problem.hidden.nan_to_num(), problem.weight, problem.targets, problem.batch, rows=problem.rows),
        everything,
    )
    got = run(problem, everything, how)
    assert_equal(got, truth, 1e-12)
    assert not got.grad_hidden[[1, 2, 3]].any()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.6e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("how", ["sweep", "stats"])
def test_dtypes(how: str, dtype: torch.dtype, tolerance: float):
    problem = make_problem(dtype)
    got, truth = run(problem, everything, how), by_autograd(problem, everything)
    assert got.grad_hidden.dtype == got.grad_weight.dtype == dtype
    # Statistics do not see the inputs' rounding again; only the gradients' last cast does.
    torch.testing.assert_close(got.logprob.double(), truth.logprob, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.entropy.double(), truth.entropy, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.grad_hidden.double(), truth.grad_hidden, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.grad_weight.double(), truth.grad_weight, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shard", [torch.randperm(20, generator=torch.Generator().manual_seed(0)), range(20)])
@pytest.mark.parametrize("how", ["sweep", "stats"])
def test_columns_in_any_order(how: str, shard):
    problem = make_problem(vocab_size=17)
    got, truth = run(problem, everything, how, shard=shard), by_autograd(problem, everything)
    order = shard if isinstance(shard, torch.Tensor) else torch.arange(20)
    torch.testing.assert_close(got.grad_weight, truth.grad_weight[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.logprob, truth.logprob)
    logits = problem.hidden @ problem.weight.T
    stats = token_stats(logits[:, order], problem.targets, shard=order, vocab_size=17)
    torch.testing.assert_close(stats.entropy, truth.entropy)


def test_gradcheck():
    problem = make_problem(tokens=5, vocab=9)

    def outputs(hidden: torch.Tensor, weight: torch.Tensor):
        stats = linear_token_stats(hidden, weight, problem.targets, temperature=0.7, vocab_size=8, chunk_rows=2)
        return stats.logprob, stats.entropy

    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    problem.targets.clamp_(max=7)
    assert torch.autograd.gradcheck(outputs, (hidden, weight))


def test_upstream_scale_reaches_both_gradients():
    problem = make_problem()
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    out = linear_policy_loss(
        hidden, weight, problem.targets, lambda stats, rows: everything(stats, problem.batch, rows)
    )
    torch.autograd.backward(-0.25 * out.loss)
    truth = by_autograd(problem, everything)
    torch.testing.assert_close(hidden.grad, -0.25 * truth.grad_hidden)
    torch.testing.assert_close(weight.grad, -0.25 * truth.grad_weight)


class Counted:
    """Counts the rows of every GEMM of a head."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.rows = {"fill": 0, "hidden_gradient": 0, "add_weight_gradient": 0}
        for name, argument in (("fill", 0), ("hidden_gradient", 0), ("add_weight_gradient", 1)):
            monkeypatch.setattr(Head, name, self._counting(getattr(Head, name), name, argument))

    def _counting(self, original, name, argument):
        def counted(head, *arguments):
            self.rows[name] += len(arguments[argument])
            return original(head, *arguments)

        return counted


def test_one_sweep_takes_three_gemms_and_two_passes_four(monkeypatch: pytest.MonkeyPatch):
    counted, problem = Counted(monkeypatch), make_problem()
    run(problem, everything, "sweep")
    assert counted.rows == {"fill": 23, "hidden_gradient": 23, "add_weight_gradient": 23}
    run(problem, everything, "two_pass")
    assert counted.rows == {"fill": 3 * 23, "hidden_gradient": 2 * 23, "add_weight_gradient": 2 * 23}


@pytest.mark.parametrize(("how", "logits"), [("sweep", 23), ("two_pass", 23 + 11)])
def test_rows_without_gradient_meet_no_gradient_gemm(monkeypatch: pytest.MonkeyPatch, how: str, logits: int):
    problem = make_problem()
    truth = by_autograd(problem, ppo)
    # Rows with advantage 0 and clipped ones.
    active = (truth.logprob - problem.batch.old).exp()
    a = problem.batch.advantages
    expected = int(((a > 0) & (active <= 1.28)).sum() + ((a < 0) & (active >= 0.8)).sum())
    assert expected == 11
    counted = Counted(monkeypatch)
    assert_equal(run(problem, ppo, how), truth, 1e-12)
    assert counted.rows == {"fill": logits, "hidden_gradient": expected, "add_weight_gradient": expected}


def test_without_gradients_only_the_logits_are_computed(monkeypatch: pytest.MonkeyPatch):
    counted, problem = Counted(monkeypatch), make_problem()
    with torch.no_grad():
        out = linear_policy_loss(
            problem.hidden.requires_grad_(),
            problem.weight,
            problem.targets,
            lambda stats, rows: everything(stats, problem.batch, rows),
        )
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, by_autograd(problem, everything).loss)
    assert counted.rows["hidden_gradient"] == counted.rows["add_weight_gradient"] == 0


def test_a_frozen_weight_costs_no_gemm(monkeypatch: pytest.MonkeyPatch):
    counted, problem = Counted(monkeypatch), make_problem()
    hidden = problem.hidden.clone().requires_grad_()
    out = linear_policy_loss(
        hidden, problem.weight, problem.targets, lambda s, rows: everything(s, problem.batch, rows)
    )
    torch.autograd.backward(out.loss)
    torch.testing.assert_close(hidden.grad, by_autograd(problem, everything).grad_hidden)
    assert counted.rows["add_weight_gradient"] == 0


def test_no_tokens():
    hidden, weight = torch.zeros(0, 6, requires_grad=True), torch.zeros(20, 6, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long)
    out = linear_policy_loss(hidden, weight, targets, lambda stats, rows: stats.logprob)
    torch.autograd.backward(out.loss + linear_token_stats(hidden, weight, targets).entropy.sum())
    assert out.loss == 0.0
    assert not weight.grad.any()


def test_impossible_targets_and_tokens_pass_no_gradient():
    hidden = torch.eye(3, requires_grad=True)
    weight = torch.tensor([[1.0, 0, 2], [0, 1, 0], [0, 0, 1]], requires_grad=True)
    targets = torch.tensor([1, 5, -100])
    for how in (linear_token_stats, None):
        weight.grad = None
        if how is None:
            loss = linear_policy_loss(hidden, weight, targets, lambda stats, rows: stats.logprob.exp()).loss
        else:
            loss = how(hidden, weight, targets).logprob.exp().sum()
        torch.autograd.backward(loss)
        assert weight.grad.isfinite().all()
        assert not weight.grad[:, 1:].any()


class TestMainGrad:
    """The accumulation protocol of Megatron-Core's fused layers."""

    def weight(self, problem: Problem) -> torch.nn.Parameter:
        weight = torch.nn.Parameter(problem.weight.clone())
        weight.main_grad = torch.ones_like(weight)
        weight.grad_added_to_main_grad = False
        return weight

    def loss(self, problem: Problem, weight: torch.nn.Parameter) -> torch.Tensor:
        def token_loss(stats: TokenStats, rows: slice) -> torch.Tensor:
            return everything(stats, problem.batch, rows)

        hidden = problem.hidden.clone().requires_grad_()
        return linear_policy_loss(hidden, weight, problem.targets, token_loss, main_grad=True).loss

    def test_is_added_to(self):
        problem = make_problem()
        weight = self.weight(problem)
        torch.autograd.backward(self.loss(problem, weight))
        torch.testing.assert_close(weight.main_grad, 1.0 + by_autograd(problem, everything).grad_weight)
        assert weight.grad_added_to_main_grad
        assert weight.grad.shape == weight.shape

    def test_placeholder_of_a_shared_embedding_is_zero(self):
        problem = make_problem()
        weight = self.weight(problem)
        weight.zero_out_wgrad = True
        torch.autograd.backward(self.loss(problem, weight) + (3.0 * weight).sum())
        torch.testing.assert_close(weight.grad, torch.full_like(weight, 3.0))

    def test_another_upstream_gradient_is_refused(self):
        problem = make_problem()
        with pytest.raises(RuntimeError, match="upstream gradient other than 1"):
            torch.autograd.backward(0.5 * self.loss(problem, self.weight(problem)))

    def test_needs_a_buffer_of_the_right_kind(self):
        problem = make_problem()
        with pytest.raises(ValueError, match=r"needs weight\.main_grad"):
            linear_policy_loss(problem.hidden, problem.weight, problem.targets, lambda s, r: s.logprob, main_grad=True)
        with pytest.raises(ValueError, match="separable=True only"):
            linear_policy_loss(
                problem.hidden,
                self.weight(problem),
                problem.targets,
                lambda s, r: s.logprob,
                main_grad=True,
                separable=False,
            )


def test_a_second_backward_pass_is_refused():
    problem = make_problem()
    hidden = problem.hidden.requires_grad_()
    loss = linear_policy_loss(hidden, problem.weight, problem.targets, lambda stats, rows: stats.logprob).loss
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already"):
        torch.autograd.backward(loss)


@pytest.mark.parametrize("separable", [True, False])
def test_a_loss_that_is_not_per_token_is_refused(separable: bool):
    problem = make_problem()
    with pytest.raises(ValueError, match="one loss for each row"):
        linear_policy_loss(
            problem.hidden,
            problem.weight,
            problem.targets,
            lambda stats, rows: stats.logprob.mean(),
            separable=separable,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, "hidden must be a floating"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[V/tp, H\] with H = 4"),
        ({"weight": torch.zeros(5, 4).bfloat16()}, "make them equal"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets must be int64"),
        ({"rows": torch.tensor([0])}, "with T = 1"),
        ({"rows": torch.tensor([0.0, 1.0])}, "rows must be int64"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"vocab_size": 6}, "vocab_size must lie in 1..5"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"sequence_parallel": True}, "give group"),
        ({"backend": "triton"}, "cannot run because the tensors are on cpu"),
    ],
)
def test_misuse_is_refused(change, message: str):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        linear_token_stats(**{**arguments, **change})
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**{**arguments, **change}, token_loss=lambda stats, rows: stats.logprob)
