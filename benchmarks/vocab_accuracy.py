"""How exact log-probability, entropy and their gradient are: ours and other projects' against an fp64 oracle.

    python benchmarks/vocab_accuracy.py --peers DIR --keep benchmarks/results/vocab_accuracy.md        # about a minute

``--peers`` names the directory that `vocab_peers.py` says how to fill; without it ours runs beside torch and
Megatron-Core. Methods that know tensor parallelism run on two ranks over gloo, the others on one. Each sees the same
fp32 (or bf16) numbers, and the oracle is computed in fp64 from those very numbers. Methods that start from hidden
states get the identity as hidden states and the logits as output weight, so that the logits are met exactly.
"""

from __future__ import annotations

import argparse
import math
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the arithmetic of compiled methods is the same, and compiling takes minutes

import torch
import torch.distributed as dist
from vocab_common import footer, group_of, launch, markdown, note_missing
from vocab_methods import Method
from vocab_peers import load

TOKENS, VOCAB, RANKS = 256, 4096, 2
NEGATIVE = -230.0


class Case(NamedTuple):
    """One kind of input: logits ``[T, V]``, targets ``[T]``."""

    logits: torch.Tensor
    targets: torch.Tensor


class Truth(NamedTuple):
    """What the oracle says in fp64; ``grads`` with and without an entropy term, ``[T, V]``."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    grads: tuple[torch.Tensor, torch.Tensor]


def cases() -> dict[str, Case]:
    """The inputs. Targets are drawn from the distribution, except where a column says otherwise."""
    normal = torch.randn(TOKENS, VOCAB, dtype=torch.float64) * 3
    holes = normal.masked_fill(torch.rand_like(normal) < 0.2, -math.inf)
    void = normal.clone()
    void[:, VOCAB // 2 :] = -math.inf
    made = {
        "random": normal,
        "+1000": normal + 1000,
        "−∞ in 20 %": holes,
        "−∞ shard": void,
        **{f"H = 1e-{digits}": certain(10.0**-digits) for digits in (2, 4, 6, 8)},
        "all < −200": normal.clamp(max=25) + NEGATIVE,
    }
    table = {name: _case(logits.float()) for name, logits in made.items()}
    return {**table, "bf16": _case(normal.bfloat16())}


def certain(entropy: float) -> torch.Tensor:
    """Random rows with one column raised until each row has this entropy, in fp64."""
    logits_TV = torch.randn(TOKENS, VOCAB, dtype=torch.float64)
    column_T1 = torch.randint(0, VOCAB, (TOKENS, 1))
    low_T1, high_T1 = torch.zeros(TOKENS, 1).double(), torch.full((TOKENS, 1), 80.0).double()
    for _ in range(60):
        middle_T1 = (low_T1 + high_T1) / 2
        over_T1 = exact(logits_TV.scatter(1, column_T1, middle_T1))[1][:, None] > entropy
        low_T1, high_T1 = torch.where(over_T1, middle_T1, low_T1), torch.where(over_T1, high_T1, middle_T1)
    return logits_TV.scatter(1, column_T1, high_T1)


def _case(logits: torch.Tensor) -> Case:
    # A tenth of the targets is uniform, for a certain row would otherwise never show another token.
    mass_TV = logits.double().softmax(-1)
    allowed_TV = (logits > -math.inf).double()
    flat_TV = allowed_TV / allowed_TV.sum(-1, keepdim=True)
    return Case(logits, torch.multinomial(0.9 * mass_TV + 0.1 * flat_TV, 1).squeeze(1))


def exact(logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropy by a sum of terms of one sign, which cannot cancel."""
    top_T1, index_T1 = logits_TV.max(dim=-1, keepdim=True)
    u_TV = logits_TV - top_T1
    logp_TV = u_TV - u_TV.exp().scatter(1, index_T1, 0.0).sum(-1, keepdim=True).log1p()
    mass_TV = logp_TV.exp()
    return logp_TV, torch.where(mass_TV > 0, mass_TV * -logp_TV, 0.0).sum(-1)


def oracle(case: Case, upstream: tuple[torch.Tensor, torch.Tensor]) -> Truth:
    """The truth about a case."""
    logp_TV, entropy_T = exact(case.logits.double())
    mass_TV = logp_TV.exp()
    target_T1 = case.targets[:, None]
    g_T1, h_T1 = (grad.double()[:, None] for grad in upstream)
    score_TV = (-mass_TV).scatter(1, target_T1, -logp_TV.gather(1, target_T1).expm1())
    bonus_TV = torch.where(mass_TV > 0, -mass_TV * (logp_TV + entropy_T[:, None]), 0.0)
    logprob_T = logp_TV.gather(1, target_T1).squeeze(1)
    return Truth(logprob_T, entropy_T, (g_T1 * score_TV, g_T1 * score_TV + h_T1 * bonus_TV))


def measure(
    method: Method, case: Case, truth: Truth, upstream: tuple[torch.Tensor, torch.Tensor], group: Any
) -> list[float]:
    """Largest errors: H relative, log-prob absolute, a row's gradient relative. ``inf`` where it does not apply."""
    width = VOCAB // RANKS
    columns = slice(dist.get_rank(group) * width, (dist.get_rank(group) + 1) * width) if method.sharded else slice(None)
    logits = case.logits[:, columns].clone()
    if method.widened:
        logits = logits.float()
    inputs = [torch.eye(TOKENS, dtype=logits.dtype), logits.t().contiguous()] if method.hidden else [logits]
    alone = None if not method.sharded else group
    result = method.run(inputs, case.targets, upstream, alone)
    entropy = math.inf
    if result.entropy is not None:
        entropy = float(((result.entropy.double() - truth.entropy).abs() / truth.entropy).max())
    logprob = float((result.logprob.double() - truth.logprob).abs().max())
    grad_TV = result.grads[1].t() if method.hidden else result.grads[0]
    wanted_TV = truth.grads[result.entropy_grad]
    squares = torch.stack(
        [(grad_TV.double() - wanted_TV[:, columns]).square().sum(-1), wanted_TV[:, columns].square().sum(-1)]
    )
    if method.sharded:
        dist.all_reduce(squares, group=group)
    gradient = float((squares[0] / squares[1]).sqrt().max())
    return [entropy, logprob, gradient]


def worker(rank: int, meeting: str, peers: Path | None, keep: Path | None) -> None:
    """One of two ranks; rank 0 reports."""
    warnings.simplefilter("ignore")
    group = group_of(rank, RANKS, meeting)
    torch.manual_seed(0)
    methods, missing = load(peers)
    upstream = (torch.randn(TOKENS), torch.randn(TOKENS))
    table = cases()
    truths = {name: oracle(case, upstream) for name, case in table.items()}
    figures: dict[str, list[list[float]]] = {}
    for method in methods:
        if not method.sharded and rank > 0:
            continue
        some = {name: case for name, case in table.items() if not (method.hidden and "∞" in name)}
        errors = {name: measure(method, case, truths[name], upstream, group) for name, case in some.items()}
        label = f"{method.name}{', from hidden states' if method.hidden else ''}"
        figures[label] = [[errors[name][kind] if name in errors else math.inf for name in table] for kind in range(3)]
    if rank == 0:
        report(figures, list(table), missing, keep)
    dist.barrier(group=group)
    dist.destroy_process_group()


def report(figures: dict[str, list[list[float]]], names: list[str], missing: dict[str, str], keep: Path | None) -> None:
    """Three tables."""
    titles = (
        "Entropy, largest relative error",
        "Log-probability, largest absolute error in nats",
        "Gradient in the logits (random upstream gradients of log p and, where it is differentiable, H), largest "
        "relative error of a row",
    )
    parts = [
        "# Accuracy of log-probability, entropy and gradient\n\nAgainst fp64; T = 256, V = 4096, fp32 logits except in "
        "the last column; NaN is bold, – is what a method does not compute or cannot be given. Rounding a gradient to "
        "bf16 costs up to 4e-3: with bf16 logits by necessity, in Megatron-Core's fused CE always. verl and SkyRL get "
        "bf16 logits widened to fp32, as Megatron-Core hands them over. 1e+00 is an answer of 0."
    ]
    for kind, title in enumerate(titles):
        lines = [[label, *(_show(error) for error in errors[kind])] for label, errors in figures.items()]
        parts.append(f"## {title}\n\n{markdown(['method', *names], lines)}")
    parts += [note_missing(missing), footer("vocab_accuracy.py --peers DIR", f"{RANKS} ranks over gloo where sharded")]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if keep:
        keep.write_text(text)


def _show(error: float) -> str:
    if math.isnan(error):
        return "**NaN**"
    return "–" if math.isinf(error) else f"{error:.0e}"


def main() -> None:
    """Start both ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="directory with the peers' wheels; see vocab_peers.py")
    parser.add_argument("--keep", type=Path, help="file that receives the tables as well")
    options = parser.parse_args()
    launch(worker, RANKS, options.peers, options.keep)


if __name__ == "__main__":
    main()
