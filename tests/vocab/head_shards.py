"""Shared by the tests of the head: objectives, their inputs, a float64 autograd oracle, and the work of one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rlvr.vocab import TokenStats, linear_policy_loss, linear_token_stats, token_stats

TOKENS, WIDTH, VOCAB = 23, 6, 20
NUCLEUS = 0.7


@dataclass(frozen=True)
class Batch:
    """Token quantities that the objectives read, each ``[T]``; sequences are runs of equal ``sequence``."""

    old: torch.Tensor
    reference: torch.Tensor
    rollout: torch.Tensor
    advantages: torch.Tensor
    sequence: torch.Tensor


Objective = Callable[[TokenStats, Batch, slice], torch.Tensor]


def ratio(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    return (stats.logprob - batch.old[rows]).exp()


def ppo(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    r, a = ratio(stats, batch, rows), batch.advantages[rows]
    return -torch.minimum(r * a, r.clamp(0.8, 1.28) * a)


def dual_clip(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    return torch.where(batch.advantages[rows] < 0, ppo(stats, batch, rows).clamp(max=1.1), ppo(stats, batch, rows))


def cispo(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    return -ratio(stats, batch, rows).detach().clamp(max=1.2) * batch.advantages[rows] * stats.logprob


def gppo(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    r = ratio(stats, batch, rows)
    return -r.detach().clamp(0.8, 1.2) / r.detach() * r * batch.advantages[rows]


def positive_weight(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    return torch.where(batch.advantages[rows] > 0, 0.35, 1.0) * ppo(stats, batch, rows)


def truncated_importance(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    return (batch.old - batch.rollout)[rows].exp().clamp(max=1.1) * ppo(stats, batch, rows)


def entropy_bonus(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    return ppo(stats, batch, rows) - 0.03 * stats.entropy


def entropy_alone(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    return 0.5 * stats.entropy.square()


def k1(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    return stats.logprob - batch.reference[rows]


def k2(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    return 0.5 * k1(stats, batch, rows).square()


def k3(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    return torch.expm1(-k1(stats, batch, rows)) + k1(stats, batch, rows)


def everything(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    weighted = positive_weight(stats, batch, rows) * (batch.old - batch.rollout)[rows].exp().clamp(max=1.1)
    return weighted + 0.01 * k3(stats, batch, rows) - 0.02 * stats.entropy


SEPARABLE: dict[str, Objective] = {
    objective.__name__: objective
    for objective in (
        *(ppo, dual_clip, cispo, gppo, positive_weight, truncated_importance, entropy_bonus, entropy_alone),
        *(k1, k2, k3, everything),
    )
}


def gspo(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    """Sequence-level ratio: each token's loss depends on its whole sequence."""
    assert rows == slice(0, len(batch.old)), "a loss that is not separable sees every row at once"
    counts = torch.bincount(batch.sequence)
    mean = torch.zeros(len(counts), dtype=stats.logprob.dtype)
    mean = mean.index_add(0, batch.sequence, stats.logprob - batch.old) / counts
    r = mean.exp()[batch.sequence]
    return -torch.minimum(r * batch.advantages, r.clamp(0.95, 1.05) * batch.advantages) / counts[batch.sequence]


def ranked(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    """Trains on the half of the batch with the largest entropies."""
    chosen = stats.entropy.detach() > stats.entropy.detach().median()
    return torch.where(chosen, ppo(stats, batch, rows), 0.0)


def siren(stats: TokenStats, batch: Batch, rows: slice) -> torch.Tensor:
    """Trains on the square of the nucleus entropy beside a policy loss."""
    assert stats.nucleus_entropy is not None
    return ppo(stats, batch, rows) + (stats.nucleus_entropy - 0.3).square() - 0.02 * stats.entropy


@dataclass(frozen=True)
class Problem:
    """Unsharded inputs of the head."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    batch: Batch
    temperature: float | torch.Tensor = 1.0
    vocab_size: int | None = None
    rows: torch.Tensor | None = None
    nucleus: float | None = None


def make_problem(
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    tokens: int = TOKENS,
    vocab: int = VOCAB,
    rows: torch.Tensor | None = None,
    **options: Any,
) -> Problem:
    """Random inputs whose ratios lie on both sides of the clip bounds; a third of the advantages is 0."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = noise(tokens, WIDTH).to(dtype), noise(vocab, WIDTH).to(dtype)
    count = tokens if rows is None else len(rows)
    targets = torch.randint(options.get("vocab_size") or vocab, (count,), generator=generator)
    used = hidden if rows is None else hidden[rows]
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    vocab_size = options.get("vocab_size")
    exact = token_stats(
        used.double() @ weight.double().T, targets, temperature=options.get("temperature", 1.0), vocab_size=vocab_size
    )
    logprob = exact.logprob.to(stats_dtype)
    advantages = noise(count) * (torch.arange(count) % 3 > 0)
    batch = Batch(
        old=logprob + noise(count, scale=0.3).to(stats_dtype),
        reference=logprob + noise(count, scale=0.3).to(stats_dtype),
        rollout=logprob + noise(count, scale=0.3).to(stats_dtype),
        advantages=advantages.to(stats_dtype),
        sequence=torch.arange(count) // 5,
    )
    return Problem(hidden, weight, targets, batch, rows=rows, **options)


@dataclass(frozen=True)
class Result:
    """Loss, statistics and gradients; a rank's gradients are its shard's."""

    loss: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor
    collectives: tuple[int, int] = (0, 0)


class Collectives(TorchDispatchMode):
    """Counts the c10d operations issued inside, whichever Python function asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def nucleus_of(scaled: torch.Tensor, share: float) -> torch.Tensor:
    """Nucleus entropy of float64 scaled logits from a sort, differentiable by autograd through the cut softmax."""
    ordered, _ = scaled.detach().sort(dim=-1, descending=True)
    short = (ordered.softmax(-1).cumsum(-1) < share).sum(-1, keepdim=True)
    lowest = ordered.gather(1, short.clamp(max=scaled.shape[1] - 1)) if share < 1.0 else -torch.inf
    inside = (scaled >= lowest) & (scaled > -torch.inf)
    logq = torch.where(inside, scaled.masked_fill(~inside, -torch.inf).log_softmax(-1), 0.0)
    return -(logq.exp() * logq * inside).sum(-1)


def by_autograd(problem: Problem, objective: Objective) -> Result:
    """Materialised logits, torch's own softmax and autograd, all in float64."""
    hidden = problem.hidden.double().clone().requires_grad_()
    weight = problem.weight.double().clone().requires_grad_()
    used = hidden if problem.rows is None else hidden[problem.rows]
    temperature = torch.as_tensor(problem.temperature, dtype=torch.float64).reshape(-1, 1)
    scaled = (used @ weight.T)[:, : problem.vocab_size] / temperature
    logp = scaled.log_softmax(-1)
    stats = TokenStats(
        logp.gather(1, problem.targets[:, None]).squeeze(1),
        -(logp.exp() * logp).sum(-1),
        nucleus_entropy=None if problem.nucleus is None else nucleus_of(scaled, problem.nucleus),
    )
    batch = Batch(*(getattr(problem.batch, name) for name in Batch.__dataclass_fields__))
    loss = objective(stats, batch, slice(0, len(problem.targets))).sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    return Result(loss.detach(), stats.logprob.detach(), stats.entropy.detach(), *grads)


def run(
    problem: Problem,
    objective: Objective,
    how: str,
    group: dist.ProcessGroup | None = None,
    shard: range | torch.Tensor | None = None,
    sequence_parallel: bool = False,
    chunk_rows: int | None = 7,
) -> Result:
    """The head by ``how``: ``sweep``, ``two_pass`` or ``stats``, on this rank's shard of the vocabulary."""
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    own = (
        shard
        if shard is not None
        else range(len(problem.weight) * rank // ranks, len(problem.weight) * (rank + 1) // ranks)
    )
    weight = problem.weight[own.start : own.stop] if isinstance(own, range) else problem.weight[own]
    hidden = problem.hidden.chunk(ranks)[rank] if sequence_parallel else problem.hidden
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    options: dict[str, Any] = {
        **{"group": group, "shard": shard, "sequence_parallel": sequence_parallel, "chunk_rows": chunk_rows},
        **{"temperature": problem.temperature, "vocab_size": problem.vocab_size, "rows": problem.rows},
        **{"nucleus": problem.nucleus},
    }

    def token_loss(stats: TokenStats, rows: slice) -> torch.Tensor:
        return objective(stats, problem.batch, rows)

    with Collectives() as forward:
        if how == "stats":
            stats = linear_token_stats(hidden, weight, problem.targets, **options)
            loss = token_loss(stats, slice(0, len(problem.targets))).sum()
            logprob, entropy = stats.logprob, stats.entropy
        else:
            out = linear_policy_loss(hidden, weight, problem.targets, token_loss, separable=how == "sweep", **options)
            loss, logprob, entropy = out.loss, out.logprob, out.entropy
    with Collectives() as backward:
        torch.autograd.backward(loss)
    assert hidden.grad is not None
    assert weight.grad is not None
    counts = (forward.count, backward.count)
    return Result(loss.detach(), logprob.detach(), entropy.detach(), hidden.grad, weight.grad, counts)


# Cases of the run over real ranks: name, how, options of `run`; shards are given for 2 and 4 ranks.
def rank_problem() -> Problem:
    return make_problem(
        seed=3, tokens=24, vocab=VOCAB, vocab_size=VOCAB - 3, rows=torch.tensor([20, 3, 4, 9, 0, 17, 23, 11])
    )


def shards(kind: str, ranks: int) -> list[range | torch.Tensor | None]:
    """Placements of the vocabulary: equal parts, unequal ones (one of them empty), or every ranks-th id."""
    if kind == "equal":
        return [None] * ranks
    if kind == "uneven":
        bounds = {2: (0, 3, VOCAB), 4: (0, 11, 11, 15, VOCAB)}[ranks]
        return [range(bounds[rank], bounds[rank + 1]) for rank in range(ranks)]
    return [torch.arange(VOCAB).flip(0)[rank::ranks].contiguous() for rank in range(ranks)]


KINDS = ("equal", "uneven", "strided")


def run_on_rank(group: dist.ProcessGroup) -> dict[str, Result]:
    """Every case of one rank in ``group``."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    problem, results = rank_problem(), {}
    cut = replace(problem, nucleus=NUCLEUS)
    for kind in KINDS:
        shard = shards(kind, ranks)[rank]
        for how in ("sweep", "two_pass", "stats"):
            for split in (False, True):
                results[f"{kind}-{how}-{split}"] = run(problem, everything, how, group, shard, split, chunk_rows=3)
                results[f"nucleus-{kind}-{how}-{split}"] = run(cut, siren, how, group, shard, split, chunk_rows=3)
    results["gspo"] = run(problem, gspo, "two_pass", group)
    return results
