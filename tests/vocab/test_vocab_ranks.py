"""The vocabulary split over real processes: same numbers as one process, same bits on all ranks, one collective."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from head_shards import KINDS, NUCLEUS, Result, by_autograd, everything, gspo, rank_problem, shards, siren
from torch.multiprocessing.spawn import start_processes
from vocab_shards import oracle, rank_cases, run_case, run_rank

Results = list[dict[tuple[int, str], Any]]
CASES = sorted(rank_cases())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Four gloo processes, started once; element r is what rank r saved."""
    out = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload(["vocab_shards"])  # torch is imported once instead of four times
    arguments = (str(out / "store"), str(out))
    start_processes(run_rank, arguments, nprocs=4, start_method="forkserver")  # type: ignore[no-untyped-call]
    return [torch.load(Path(out) / f"rank{rank}.pt", weights_only=False) for rank in range(4)]


def teams(ranks: int) -> list[list[int]]:
    """World ranks that shard one vocabulary together."""
    return [list(range(start, start + ranks)) for start in range(0, 4, ranks)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_sharded_equals_whole_and_oracle(results: Results, name: str, ranks: int) -> None:
    case = rank_cases()[name]
    whole, truth = run_case(case), oracle(case)
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2e-2}[case.logits.dtype]
    for team in teams(ranks):
        outcomes = [results[rank][ranks, name] for rank in team]
        grad = torch.cat([outcome.grad for outcome in outcomes], dim=1)
        assert grad.dtype == case.logits.dtype
        torch.testing.assert_close(outcomes[0].logprob, whole.logprob, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(outcomes[0].entropy, whole.entropy, rtol=2e-6, atol=0.0)
        torch.testing.assert_close(outcomes[0].logprob.double(), truth.logprob, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(grad.double(), truth.grad, rtol=tolerance, atol=tolerance)
        if case.nucleus is not None:
            found = outcomes[0].nucleus_entropy
            torch.testing.assert_close(found, whole.nucleus_entropy, rtol=2e-6, atol=1e-9)
            torch.testing.assert_close(found.double(), truth.nucleus_entropy, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_the_same_bits(results: Results, name: str, ranks: int) -> None:
    for team in teams(ranks):
        first = results[team[0]][ranks, name]
        for rank in team[1:]:
            other = results[rank][ranks, name]
            assert other.logprob.numpy().tobytes() == first.logprob.numpy().tobytes()
            assert other.entropy.numpy().tobytes() == first.entropy.numpy().tobytes()
            if first.nucleus_entropy is not None:
                assert other.nucleus_entropy.numpy().tobytes() == first.nucleus_entropy.numpy().tobytes()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_one_collective_forward_and_none_backward(results: Results, name: str, ranks: int) -> None:
    # A nucleus adds its all-gather and, but for the whole row, an all-reduce for each digit of its lowest logit.
    more = {"nucleus_double": 1 + 6, "nucleus_plain": 1}.get(name, 1 + 3 if name.startswith("nucleus") else 0)
    assert {results[rank][ranks, name].collectives for rank in range(4)} == {(1 + more, 0)}


def test_unsharded_call_needs_no_process_group() -> None:
    assert run_case(rank_cases()["plain"]).collectives == (0, 0)


HOWS = ("sweep", "two_pass", "stats")


def whole_weight(parts: list[torch.Tensor], kind: str, ranks: int) -> torch.Tensor:
    """The gradient of the whole output weight from those of its shards."""
    whole = torch.full((20, parts[0].shape[1]), torch.nan, dtype=parts[0].dtype)
    start = 0
    for part, shard in zip(parts, shards(kind, ranks), strict=True):
        ids = shard if isinstance(shard, torch.Tensor) else torch.arange(start, start + len(part))
        whole[ids] = part
        start += len(part)
    return whole


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("split", [False, True], ids=["replicated", "sequence_parallel"])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_head_equals_autograd(results: Results, kind: str, how: str, split: bool, ranks: int) -> None:
    case = f"{kind}-{how}-{split}"
    assert_head_equals(results, case, by_autograd(rank_problem(), everything), kind, split, ranks)
    truth = by_autograd(dataclasses.replace(rank_problem(), nucleus=NUCLEUS), siren)
    assert_head_equals(results, f"nucleus-{case}", truth, kind, split, ranks)


def assert_head_equals(results: Results, case: str, truth: Result, kind: str, split: bool, ranks: int) -> None:
    for team in teams(ranks):
        got = [results[rank][ranks, f"head:{case}"] for rank in team]
        torch.testing.assert_close(got[0].loss, truth.loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[0].logprob, truth.logprob, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[0].entropy, truth.entropy, rtol=1e-12, atol=1e-12)
        hidden = torch.cat([part.grad_hidden for part in got]) if split else got[0].grad_hidden
        torch.testing.assert_close(hidden, truth.grad_hidden, rtol=1e-11, atol=1e-12)
        weight = whole_weight([part.grad_weight for part in got], kind, ranks)
        torch.testing.assert_close(weight, truth.grad_weight, rtol=1e-11, atol=1e-12)
        for part in got[1:]:
            assert torch.equal(part.loss, got[0].loss)
            assert torch.equal(part.logprob, got[0].logprob)
            assert torch.equal(part.entropy, got[0].entropy)
            assert split or torch.equal(part.grad_hidden, got[0].grad_hidden)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_sequence_objective_equals_autograd(results: Results, ranks: int) -> None:
    truth = by_autograd(rank_problem(), gspo)
    got = results[0][ranks, "head:gspo"]
    torch.testing.assert_close(got.loss, truth.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.grad_hidden, truth.grad_hidden, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_collectives_of_the_head(results: Results, kind: str, ranks: int) -> None:
    # Eight rows in chunks of three; the hidden gradient is reduced once, and a split sequence gathered for each pass.
    expected = {
        ("sweep", False): (3 + 1, 0),
        ("sweep", True): (1 + 3 + 1, 0),
        ("two_pass", False): (1, 1),
        ("two_pass", True): (2, 2),
        ("stats", False): (1, 1),
        ("stats", True): (2, 2),
    }
    for (how, split), counts in expected.items():
        assert results[0][ranks, f"head:{kind}-{how}-{split}"].collectives == counts, (how, split)
        # In fp64 six all-reduces find the nuclei of a chunk. The sweep gathers their states for each chunk; two passes
        # gather those once, but maxima for each chunk.
        more = 3 * (6 + 1) if how == "sweep" else 3 * (6 + 1) + 1
        cut = results[0][ranks, f"head:nucleus-{kind}-{how}-{split}"].collectives
        assert cut == (counts[0] + more, counts[1]), (how, split)
