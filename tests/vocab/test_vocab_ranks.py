"""The vocabulary split over real processes: same numbers as one process, same bits on all ranks, one collective."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import start_processes
from vocab_shards import Outcome, oracle, rank_cases, run_case, run_rank

Results = list[dict[tuple[int, str], Outcome]]
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


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_the_same_bits(results: Results, name: str, ranks: int) -> None:
    for team in teams(ranks):
        first = results[team[0]][ranks, name]
        for rank in team[1:]:
            other = results[rank][ranks, name]
            assert other.logprob.numpy().tobytes() == first.logprob.numpy().tobytes()
            assert other.entropy.numpy().tobytes() == first.entropy.numpy().tobytes()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_one_collective_forward_and_none_backward(results: Results, name: str, ranks: int) -> None:
    assert {results[rank][ranks, name].collectives for rank in range(4)} == {(1, 0)}


def test_unsharded_call_needs_no_process_group() -> None:
    assert run_case(rank_cases()["plain"]).collectives == (0, 0)
