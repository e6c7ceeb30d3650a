"""Shared by the vocabulary tests: an independent float64 oracle, the inputs of the multi-rank run and its worker.

The worker imports nothing of pytest, so that spawned ranks start quickly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from head_shards import Collectives, Result, nucleus_of, run_on_rank

from megatron_rlvr.vocab import token_stats
from megatron_rlvr.vocab.state import RowState, unpack
from megatron_rlvr.vocab.torch_rows import TorchRows


@dataclass(frozen=True)
class Case:
    """Unsharded inputs of one call and the upstream gradients of its outputs."""

    logits: torch.Tensor
    targets: torch.Tensor
    temperature: float | torch.Tensor
    vocab_size: int | None
    grad_logprob: torch.Tensor
    grad_entropy: torch.Tensor
    nucleus: float | None = None
    grad_nucleus: torch.Tensor | None = None


def make_case(
    logits: torch.Tensor, temperature: float | torch.Tensor = 1.0, vocab_size: int | None = None, seed: int = 0
) -> Case:
    """A case with random targets among the real columns and random upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = logits.shape
    stats = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return Case(
        logits=logits,
        targets=torch.randint(vocab_size or width, (rows,), generator=generator),
        temperature=temperature,
        vocab_size=vocab_size,
        grad_logprob=torch.randn(rows, generator=generator, dtype=stats),
        grad_entropy=torch.randn(rows, generator=generator, dtype=stats),
    )


def with_nucleus(case: Case, share: float) -> Case:
    """The same case with a nucleus entropy and a random upstream gradient of it."""
    grad = torch.randn(len(case.grad_entropy), generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return replace(case, nucleus=share, grad_nucleus=grad.to(case.grad_entropy.dtype))


def rank_cases() -> dict[str, Case]:
    """The inputs of the multi-rank run; every width divides by 4."""
    generator = torch.Generator().manual_seed(7)

    def noise(rows: int, width: int, scale: float = 3.0) -> torch.Tensor:
        return scale * torch.randn(rows, width, generator=generator)

    impossible = noise(6, 32)
    impossible[:, 8:16] = -torch.inf  # the whole second shard of four
    impossible[2, 16:] = -torch.inf
    peaked = noise(64, 64, 1.0)
    peaked[torch.arange(64), torch.arange(64)] += 4.0 + torch.arange(64) / 3.0
    gulf = noise(8, 32)
    gulf[:, :8] -= 300.0
    gulf[:4] += 1e4
    gulf[4:] -= 1e4
    cases = {
        "plain": make_case(noise(33, 48)),
        "double": make_case(noise(9, 16).double(), temperature=0.7),
        "bfloat16": make_case(noise(20, 64).bfloat16(), temperature=1.3),
        "row_temperature": make_case(noise(5, 24), temperature=torch.tensor([0.3, 0.7, 1.0, 1.5, 4.0])),
        "padded": make_case(noise(12, 32), vocab_size=19),  # the last shard of four is all padding
        "impossible": make_case(impossible),
        "peaked": make_case(peaked),
        "gulf": make_case(gulf),
        "no_rows": make_case(noise(0, 16)),
    }
    shares = {"double": 0.7, "bfloat16": 0.9, "row_temperature": 0.5, "padded": 0.8, "impossible": 0.8, "plain": 1.0}
    shares |= {"peaked": 0.95, "gulf": 0.8, "no_rows": 0.8}
    return cases | {f"nucleus_{name}": with_nucleus(cases[name], share) for name, share in shares.items()}


@dataclass(frozen=True)
class Outcome:
    """What one rank got for one case: its statistics, its shard's gradient and its collectives by phase."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    grad: torch.Tensor
    collectives: tuple[int, int]
    nucleus_entropy: torch.Tensor | None = None


def run_case(case: Case, group: dist.ProcessGroup | None = None) -> Outcome:
    """Run one case on this rank's shard, forward and backward."""
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    shard = case.logits.chunk(ranks, dim=1)[rank].clone().requires_grad_()
    with Collectives() as forward:
        stats = token_stats(
            shard,
            case.targets,
            group=group,
            temperature=case.temperature,
            vocab_size=case.vocab_size,
            nucleus=case.nucleus,
        )
    upstream = [case.grad_logprob, case.grad_entropy, *([] if case.grad_nucleus is None else [case.grad_nucleus])]
    with Collectives() as backward:
        torch.autograd.backward(stats.differentiable(), upstream)
    assert shard.grad is not None
    return Outcome(
        stats.logprob.detach(),
        stats.entropy.detach(),
        shard.grad,
        (forward.count, backward.count),
        None if stats.nucleus_entropy is None else stats.nucleus_entropy.detach(),
    )


def run_rank(rank: int, store: str, out: str) -> None:
    """One of four processes: every case over two pairs of ranks and over all four; results go to ``out``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[rank // 2], 4: dist.group.WORLD}
    results: dict[tuple[int, str], Outcome | Result] = {
        (ranks, name): run_case(case, group) for ranks, group in groups.items() for name, case in rank_cases().items()
    }
    for ranks, group in groups.items():
        results |= {(ranks, f"head:{name}"): result for name, result in run_on_rank(group).items()}
    torch.save(results, Path(out) / f"rank{rank}.pt")
    dist.destroy_process_group()


def shard_state(logits: torch.Tensor, columns: torch.Tensor, temperature: torch.Tensor) -> RowState:
    """The state of one shard, with its moments."""
    rows = TorchRows(*logits.shape, temperature.dtype, logits.device)
    rows.logits.copy_(logits)
    return unpack(rows.state(columns, temperature, extras=True))


def oracle(case: Case) -> Outcome:
    """The same from float64 log-softmax and autograd, as textbooks write it."""
    logits = case.logits.detach().double().requires_grad_()
    temperature = torch.as_tensor(case.temperature, dtype=torch.float64).reshape(-1, 1)
    real = logits[:, : case.vocab_size]
    logp = (real / temperature).log_softmax(dim=-1)
    possible = logp > -torch.inf
    logprob = logp.gather(1, case.targets[:, None]).squeeze(1)
    finite = torch.where(possible, logp, 0.0)
    entropy = -(finite.exp() * finite * possible).sum(dim=-1)
    loss_terms = torch.where(logprob > -torch.inf, logprob, 0.0) * case.grad_logprob + entropy * case.grad_entropy
    nucleus_entropy = None
    if case.nucleus is not None and case.grad_nucleus is not None:
        nucleus_entropy = nucleus_of(real / temperature, case.nucleus)
        loss_terms = loss_terms + nucleus_entropy * case.grad_nucleus
        nucleus_entropy = nucleus_entropy.detach()
    (grad,) = torch.autograd.grad(loss_terms.sum(), logits)
    return Outcome(logprob.detach(), entropy.detach(), grad, (0, 0), nucleus_entropy)
