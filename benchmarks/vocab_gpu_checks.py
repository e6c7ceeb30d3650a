"""The row passes on one device at real vocabulary widths, against float64 on the CPU; used by `vocab_gpu.py`.

Outputs are filled with NaN first and the inputs are new for every run. Tensor parallelism is emulated: the shards run
one after another and their gathered states are merged as the ranks would merge them.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from megatron_rlvr.vocab import state
from megatron_rlvr.vocab.torch_rows import TorchRows

TOKENS = 32
WIDTHS = (151936, 50257)
SHARDS = (1, 4, 8)


class Truth(NamedTuple):
    """Float64: log-prob and entropy ``[T]``, gradient in the logits ``[T, V]``."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    grad: torch.Tensor


class Worst(NamedTuple):
    """Of one case: largest relative errors of log-prob and entropy, error of the gradient relative to its norm."""

    logprob: float
    entropy: float
    grad: float

    def passes(self, dtype: torch.dtype) -> bool:
        """Statistics must be exact to fp32, the gradient to the rounding of its own dtype; NaN never passes."""
        return self.logprob <= 2e-6 and self.entropy <= 2e-6 and self.grad <= max(2e-6, torch.finfo(dtype).eps)


def cases(vocab: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Logits ``[T, V]`` fp32 on the CPU, by the name of what makes them hard."""
    plain = 2.0 * torch.randn(TOKENS, vocab, generator=generator)
    columns = torch.arange(vocab)
    certain = plain.clone()
    winners = torch.randint(vocab, (TOKENS,), generator=generator)
    certain[torch.arange(TOKENS), winners] += torch.linspace(8.0, 40.0, TOKENS)
    return {
        "random": plain,
        "offset 1e4": plain + 1e4,
        "all below -200": plain - 250.0,
        "-inf columns": plain.masked_fill(columns % 3 == 0, -torch.inf),
        "-inf shard": plain.masked_fill(columns < vocab // 4, -torch.inf),
        "near-deterministic": certain,
        "uniform": torch.zeros(TOKENS, vocab),
    }


def truth_of(logits: torch.Tensor, targets: torch.Tensor, tau: torch.Tensor, g: torch.Tensor, h: torch.Tensor) -> Truth:
    """Around the maximum and with the largest term apart, so that almost certain rows are exact too."""
    z, scale = logits.double(), 1.0 / tau.double()[:, None]
    u = ((z - z.max(dim=1, keepdim=True).values) * scale).clamp(min=-1e4)
    mass = u.exp()
    rest = mass.scatter(1, z.argmax(dim=1, keepdim=True), 0.0).sum(dim=1)
    logp = u - rest.log1p()[:, None]
    entropy = rest.log1p() - (u * mass).sum(dim=1) / (1.0 + rest)
    logprob = logp.gather(1, targets[:, None])[:, 0]
    possible = logits.gather(1, targets[:, None])[:, 0] != -torch.inf
    g = g.double() * possible
    probs = logp.exp()
    grad = -probs * (g[:, None] + h.double()[:, None] * (logp + entropy[:, None]))
    grad.scatter_add_(1, targets[:, None], g[:, None])
    return Truth(torch.where(possible, logprob, -torch.inf), entropy, grad * scale)


def run_case(logits: torch.Tensor, shards: int, device: torch.device, generator: torch.Generator) -> Worst:
    """One case through the kernels (on the CPU: through torch), in ``shards`` pieces of unequal width."""
    vocab = logits.shape[1]
    targets = torch.randint(vocab, (TOKENS,), generator=generator)
    targets[: TOKENS // 2] = logits[: TOKENS // 2].argmax(dim=1)
    tau = torch.where(torch.arange(TOKENS) % 2 == 0, 1.0, 0.7)
    g, h = torch.randn(2, TOKENS, generator=generator)
    truth = truth_of(logits, targets, tau, g, h)
    g = g.masked_fill(truth.logprob == -torch.inf, 0.0)
    bounds = [0, *(vocab * cut // shards - 3 * cut for cut in range(1, shards)), vocab]
    parts = [logits[:, start:end].to(device).contiguous() for start, end in itertools.pairwise(bounds)]
    columns = [(targets - start).to(device) for start in bounds[:-1]]
    tau_T = tau.to(device)
    states = [state.unpack(_state(*pair, tau_T)) for pair in zip(parts, columns, strict=True)]
    whole = states[0]
    for other in states[1:]:
        whole = state.merge(whole, other, tau_T)
    stats = state.finish(whole, tau_T)
    grads = []
    for part, own in zip(parts, columns, strict=True):
        out = torch.full_like(part, math.nan)
        _gradient(out, part, state.totals(whole, stats, own, tau_T), g.to(device), h.to(device))
        grads.append(out.double().cpu())
    grad = torch.cat(grads, dim=1)
    return Worst(
        _relative(stats.logprob, truth.logprob),
        _relative(stats.entropy, truth.entropy),
        float((grad - truth.grad).norm() / truth.grad.norm()),
    )


def _state(logits_TV: torch.Tensor, columns_T: torch.Tensor, tau_T: torch.Tensor) -> torch.Tensor:
    if logits_TV.is_cuda:
        from megatron_rlvr.vocab import triton_rows

        return triton_rows.shard_state(logits_TV, columns_T, tau_T, False)
    return _torch_rows(logits_TV).state(columns_T, tau_T, extras=False)


def _gradient(
    out_TV: torch.Tensor, logits_TV: torch.Tensor, totals: state.Totals, g_T: torch.Tensor, h_T: torch.Tensor
) -> None:
    if logits_TV.is_cuda:
        from megatron_rlvr.vocab import triton_rows

        triton_rows.write_gradient_(out_TV, logits_TV, *totals, g_T, h_T)
        return
    rows = _torch_rows(logits_TV)
    rows.recall(totals.max, totals.temperature)
    out_TV.copy_(rows.gradient(totals, g_T, h_T))


def _torch_rows(logits_TV: torch.Tensor) -> TorchRows:
    tokens, width = logits_TV.shape
    rows = TorchRows(tokens, width, torch.float32, logits_TV.device)
    rows.logits.copy_(logits_TV)
    return rows


def _relative(got_T: torch.Tensor, truth_T: torch.Tensor) -> float:
    """Largest relative error where the truth is at least 1e-8 in size; infinities must agree."""
    got_T = got_T.double().cpu()
    finite = truth_T.isfinite()
    if not torch.equal(got_T[~finite], truth_T[~finite]):
        return math.nan
    tested = finite & (truth_T.abs() >= 1e-8)
    return float(((got_T - truth_T).abs() / truth_T.abs())[tested].max())


def report(device: torch.device, seed: int, widths: tuple[int, ...] = WIDTHS) -> tuple[list[list[str]], bool]:
    """Rows for the table, worst over widths and shards, and whether every case passes."""
    generator = torch.Generator().manual_seed(seed)
    lines, good = [], True
    for dtype in (torch.bfloat16, torch.float32):
        found: dict[str, list[Worst]] = {}
        for vocab in widths:
            for name, logits in cases(vocab, generator).items():
                found.setdefault(name, []).extend(
                    run_case(logits.to(dtype), shards, device, generator) for shards in SHARDS
                )
        for name, results in found.items():
            passed = all(worst.passes(dtype) for worst in results)
            good &= passed
            figures = [f"{max(values):.1e}" for values in zip(*results, strict=True)]
            lines.append([name, str(dtype).removeprefix("torch."), *figures, "yes" if passed else "**NO**"])
    return lines, good
