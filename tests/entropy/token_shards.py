"""Shared by the token tests: batches, how they are split over ranks, and the worker of the multi-rank run.

The worker imports nothing of pytest, so that spawned ranks start quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlvr.core import RLVRError
from megatron_rlvr.entropy.selection import global_count, global_max, global_mean, global_sum, kth_largest, largest
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
from megatron_rlvr.entropy.tokens import TokenBatch, TokenRule

RULES: dict[str, tuple[TokenRule, float]] = {
    "uniform": (Uniform(), 0.0),
    "confident": (ConfidentSigns(), 0.3),
    "surprisal": (Surprisal(), 0.1),
    "surprisal_both": (Surprisal(both_signs=True), 0.2),
    "clip_cov": (ClipCov(share=0.03), 0.0),
    "kl_cov": (KlCov(share=0.03), 0.0),
    "top_entropy": (TopEntropy(), 0.0),
    "entropy_advantage": (EntropyAdvantage(), 0.0),
    "low_prob_positives": (LowProbPositives(), 1.7),
    "steer": (Steer(), 0.0),
    "steer_linear": (Steer(form="linear"), 0.0),
    "log_prob_advantage": (LogProbAdvantage(), 0.4),
    "nucleus_bonus": (NucleusBonus(), 0.0),
    "random_positives": (RandomPositives(share=0.1), 0.0),
}
TENSORS = ("logprob", "entropy", "advantages", "row", "index", "nucleus_entropy")


def make_batch(dtype: torch.dtype = torch.float64, rows: int = 24, seed: int = 3) -> TokenBatch:
    """Rows of unequal length with many ties: entropies on a coarse grid, repeated log-probs, a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (rows,), generator=generator)
    row = torch.arange(rows).repeat_interleave(lengths)
    tokens = len(row)
    entropy = (torch.rand(tokens, generator=generator) * 3.0).mul(8).floor().div(8)
    logprob = -torch.rand(tokens, generator=generator).clamp(min=1e-6).pow(-0.7).sub(1.0)
    logprob[::3] = logprob[0]
    advantages = torch.randn(rows, generator=generator) * 1.3
    advantages[::5] = 0.0
    return TokenBatch(
        logprob=logprob.to(dtype),
        entropy=entropy.to(dtype),
        advantages=advantages[row].to(dtype),
        row=row,
        index=torch.arange(tokens) * 7 + 5,
        nucleus_entropy=(entropy * 0.8).to(dtype),
        seed=11,
    )


def select(batch: TokenBatch, place: torch.Tensor, group: dist.ProcessGroup | None = None) -> TokenBatch:
    """The tokens at ``place``, in that order."""
    rest = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name not in TENSORS}
    tensors = {name: getattr(batch, name)[place] for name in TENSORS}
    return TokenBatch(**(rest | tensors | {"group": group}))


def places(batch: TokenBatch, ranks: int) -> list[torch.Tensor]:
    """Whole rows dealt to ranks, each rank's tokens shuffled; of three ranks the middle one has none."""
    generator = torch.Generator().manual_seed(17 + ranks)
    hosts = torch.randint(0, 2, (int(batch.row.max()) + 1,), generator=generator) * (ranks - 1)
    owned = [(hosts[batch.row] == rank).nonzero().squeeze(1) for rank in range(ranks)]
    return [place[torch.randperm(len(place), generator=generator)] for place in owned]


def special_values() -> torch.Tensor:
    """Ties, infinities, zeros of both signs, denormals and the ends of fp32."""
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    extremes = [torch.inf, -torch.inf, -torch.inf, huge, -huge, tiny, -tiny, 2.0**-149, -(2.0**-149), 3 * 2.0**-149]
    return torch.tensor([0.0, -0.0, 1.0, 1.0, 1.0, -1.0, *extremes, 1.0 + 2.0**-23, 1.0 - 2.0**-24, 0.0, -0.0])


def refusal(call: Callable[[], object]) -> str:
    """What ``call`` refuses with."""
    try:
        call()
    except RLVRError as error:
        return str(error)
    return ""


def run_on(batch: TokenBatch, values: torch.Tensor) -> dict[str, Any]:
    """Every rule, sum and refusal on this rank's tokens, and every order statistic of ``values``."""
    group = batch.group
    results: dict[str, Any] = {name: rule(batch, gain) for name, (rule, gain) in RULES.items()}
    results["index"] = batch.index
    results["scalars"] = [
        global_count(batch.advantages > 0, group),
        global_sum(batch.logprob, group),
        global_sum(batch.logprob.float() * 1e30, group),
        global_mean(batch.entropy, group),
        global_max(batch.entropy, group),
        masked_nucleus_entropy(batch),
    ]
    total = global_count(torch.ones_like(values, dtype=torch.bool), group)
    results["kth"] = torch.stack([kth_largest(values, k, group) for k in range(1, total + 1)])
    nan = torch.where(values == torch.inf, torch.nan, values)  # on one rank only
    index = torch.arange(len(values))
    results["nan"] = refusal(lambda: largest(nan, index, 1, group=group))
    results["twins"] = refusal(lambda: largest(torch.zeros_like(values), index, 1, group=group))  # each counts from 0
    results["batch"] = refusal(lambda: TokenBatch(nan * 0, nan * 0, nan, index, index, group=group))
    return results


def run_rank(rank: int, store: str, out: str) -> None:
    """One of three processes: everything over two of them and over all three; results go to ``out``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    pair = dist.new_group([0, 1])
    results: dict[tuple[int, torch.dtype], dict[str, Any]] = {}
    for ranks, group in {2: pair, 3: dist.group.WORLD}.items():
        if rank >= ranks:
            continue
        for dtype in (torch.float32, torch.float64):
            whole = make_batch(dtype)
            batch = select(whole, places(whole, ranks)[rank], group)
            results[ranks, dtype] = run_on(batch, special_values()[rank::ranks])
    torch.save(results, Path(out) / f"rank{rank}.pt")
    dist.destroy_process_group()
