"""Certified sparse rows as a prototype: a row of the logit gradient keeps its target and the K largest logits.

Only `sparse_rows.py` uses it, which measures whether it is worth having. Nothing of it is in the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

CHUNK = 256


class Rows(NamedTuple):
    """Rows of the head: the final hidden state, the token that followed, its advantage, and the kind of its prompt."""

    hidden: torch.Tensor
    targets: torch.Tensor
    advantages: torch.Tensor
    kinds: torch.Tensor

    def pick(self, index: torch.Tensor) -> Rows:
        """Some of the rows."""
        return Rows(*(field[index] for field in self))


def chunks(rows: Rows) -> Iterator[slice]:
    """Slices of up to ``CHUNK`` rows."""
    return (slice(start, start + CHUNK) for start in range(0, len(rows.targets), CHUNK))


def logit_gradient(logits_TV: torch.Tensor, rows: Rows, bonus: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``dz`` of sum(A * logprob + bonus * entropy), over the logits, and each row's entropy."""
    logp_TV = torch.log_softmax(logits_TV, dim=-1)
    mass_TV = logits_TV.copy_(logp_TV).exp_()
    entropy_T = torch.linalg.vecdot(mass_TV, logp_TV).neg_()
    logprob_T1 = logp_TV.gather(1, rows.targets[:, None])
    target_T1 = rows.advantages[:, None] * logprob_T1.expm1() + bonus * logprob_T1.exp() * (
        logprob_T1 + entropy_T[:, None]
    )
    if bonus:
        slope_TV = logp_TV.add_(entropy_T[:, None]).mul_(bonus).add_(rows.advantages[:, None])
        dz_TV = mass_TV.mul_(slope_TV).neg_()
    else:
        dz_TV = mass_TV.mul_(-rows.advantages[:, None])
    return dz_TV.scatter_(1, rows.targets[:, None], -target_T1), entropy_T


def kept_columns(logits_TV: torch.Tensor, targets_T: torch.Tensor, kept: int) -> torch.Tensor:
    """Columns ``[T, K + 1]``: the K largest logits, then the target (twice where it is among them)."""
    return torch.cat([logits_TV.topk(kept, dim=-1).indices, targets_T[:, None]], dim=1)


def kept_values(dz_TV: torch.Tensor, columns_TK: torch.Tensor) -> torch.Tensor:
    """The gradient's entries in those columns, the target's not counted twice."""
    values_TK = dz_TV.gather(1, columns_TK)
    values_TK[:, -1].masked_fill_((columns_TK[:, :-1] == columns_TK[:, -1:]).any(1), 0.0)
    return values_TK


def qualifies(dropped_T: torch.Tensor, energy_T: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The largest set of rows whose dropped energy stays under ``epsilon**2`` times all energy."""
    order_T = dropped_T.argsort()
    inside_T = dropped_T[order_T].cumsum(0) <= epsilon**2 * energy_T.sum()
    return torch.zeros_like(inside_T).scatter_(0, order_T, inside_T)


class Reduced(NamedTuple):
    """A chunk's gradient with the kept entries zeroed, those entries, and which rows may go without the rest."""

    rest_TV: torch.Tensor
    columns_TK: torch.Tensor
    original_TK: torch.Tensor
    values_TK: torch.Tensor
    fits_T: torch.Tensor


def reduce(dz_TV: torch.Tensor, columns_TK: torch.Tensor, epsilon: float) -> Reduced:
    """Split a gradient, used up, into kept entries and rest, and pick the rows that the certificate lets go sparse."""
    energy_T = torch.linalg.vecdot(dz_TV, dz_TV)
    original_TK, values_TK = dz_TV.gather(1, columns_TK), kept_values(dz_TV, columns_TK)
    dz_TV.scatter_(1, columns_TK, 0.0)
    fits_T = qualifies(torch.linalg.vecdot(dz_TV, dz_TV), energy_T, epsilon)
    return Reduced(dz_TV, columns_TK, original_TK, values_TK, fits_T)


def sweep(rows: Rows, weight: torch.Tensor, bonus: float, kept: int, epsilon: float) -> float:
    """One sweep for dX and dW, with a certificate for each chunk; dense where ``kept`` is 0. Returns the sparse share.

    A chunk's dense rows find their logits still there, so the cost is 1 + 2f units of GEMM against 3, with f the dense
    share. One certificate for all rows would need a second pass, 1 + 3f.
    """
    grad_hidden, grad_weight = torch.empty_like(rows.hidden), torch.zeros_like(weight)
    sparse = 0
    for part in chunks(rows):
        chunk = Rows(*(field[part] for field in rows))
        logits_TV = chunk.hidden @ weight.T
        columns_TK = kept_columns(logits_TV, chunk.targets, kept) if kept else None
        dz_TV = logit_gradient(logits_TV, chunk, bonus)[0]
        if columns_TK is None:
            torch.mm(dz_TV, weight, out=grad_hidden[part])
            grad_weight.addmm_(dz_TV.T, chunk.hidden)
            continue
        split = reduce(dz_TV, columns_TK, epsilon)
        few, many = split.fits_T.nonzero().squeeze(1), (~split.fits_T).nonzero().squeeze(1)
        dense_TV = split.rest_TV[many].scatter_(1, columns_TK[many], split.original_TK[many])
        grad_hidden[part][many] = dense_TV @ weight
        grad_weight.addmm_(dense_TV.T, chunk.hidden[many])
        values_TK = split.values_TK[few]
        grad_hidden[part][few] = torch.bmm(values_TK[:, None], weight[columns_TK[few]]).squeeze(1)
        outer_TKH = values_TK[:, :, None] * chunk.hidden[few][:, None]
        grad_weight.index_add_(0, columns_TK[few].flatten(), outer_TKH.flatten(0, 1))
        sparse += len(few)
    return sparse / len(rows.targets)
