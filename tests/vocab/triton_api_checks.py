"""The public functions over the Triton row kernels, against the same functions in float64; see `triton_rows_checks`."""

from __future__ import annotations

import pytest
import torch

from megatron_rlvr.vocab import linear_policy_loss, linear_token_stats, rows, token_stats
from megatron_rlvr.vocab.state import TokenStats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the kernels run in the interpreter, which ``backend="triton"`` refuses as it should."""
    if DEVICE == "cpu":
        monkeypatch.setattr(rows, "choose", lambda backend, *_: backend)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaf(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(DEVICE, dtype).requires_grad_()


def loss_of(stats: TokenStats) -> torch.Tensor:
    assert stats.extras is not None
    scale = stats.extras.collision + stats.extras.entropy_slope
    nucleus = 0.0 if stats.nucleus_entropy is None else 0.5 * stats.nucleus_entropy.square()
    return (-stats.logprob + 0.3 * stats.entropy + nucleus) * scale


def grads(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_equal(got: list[torch.Tensor], truth: list[torch.Tensor], rtol: float = 2e-5) -> None:
    for value, true in zip(got, truth, strict=True):
        torch.testing.assert_close(value.double(), true.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("nucleus", [None, 0.8])
@pytest.mark.parametrize("reuse_logits", [False, True])
def test_token_stats(reuse_logits: bool, nucleus: float | None) -> None:
    values, targets = draw(5, 1100, seed=1), torch.tensor([0, 3, 1090, 1099, -1], device=DEVICE)
    values[2, 7:1000] = -torch.inf
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0, 1.0], device=DEVICE)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
        logits = leaf(values, dtype)
        stats = token_stats(
            logits * 1.0,
            targets,
            temperature=temperature,
            vocab_size=1095,
            extras=True,
            nucleus=nucleus,
            reuse_logits=reuse_logits,
            backend=backend,
        )
        possible = torch.tensor([True, True, True, False, False], device=DEVICE)
        assert (stats.logprob[~possible] == -torch.inf).all()
        results.append(grads(loss_of(stats)[possible].sum() + stats.entropy[~possible].sum(), logits))
    assert_equal(*results)


def head_results(function: str, dtype: torch.dtype, backend: str, nucleus: float | None) -> list[torch.Tensor]:
    hidden, weight = leaf(draw(9, 16, seed=2), dtype), leaf(draw(300, 16, seed=3), dtype)
    chosen = torch.tensor([8, 0, 3, 4, 6, 7, 2], device=DEVICE)
    targets = torch.tensor([0, 17, 290, 5, 5, 299, 31], device=DEVICE)
    active = (torch.tensor([1, 0, 1, 1, 0, 0, 1], device=DEVICE)).to(dtype)
    common = {"rows": chosen, "temperature": 0.7, "extras": True, "backend": backend, "chunk_rows": 3}
    common["nucleus"] = nucleus
    if function == "linear_token_stats":
        stats = linear_token_stats(hidden, weight, targets, **common)
        return grads((loss_of(stats) * active).sum(), hidden, weight)

    def token_loss(stats: TokenStats, part: slice) -> torch.Tensor:
        return loss_of(stats) * active[part]

    return grads(linear_policy_loss(hidden, weight, targets, token_loss, **common).loss, hidden, weight)


@pytest.mark.parametrize("nucleus", [None, 0.8])
@pytest.mark.parametrize("function", ["linear_token_stats", "linear_policy_loss"])
def test_heads(function: str, nucleus: float | None) -> None:
    truth = head_results(function, torch.float64, "torch", nucleus)
    assert_equal(head_results(function, torch.float32, "triton", nucleus), truth)
    assert_equal(head_results(function, torch.bfloat16, "triton", nucleus), truth, rtol=0.1)
