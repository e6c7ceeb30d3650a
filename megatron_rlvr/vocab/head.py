"""The output layer as GEMMs over chunks of tokens: logits into a buffer, and the two gradients out of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_rlvr.vocab import rows as row_passes
from megatron_rlvr.vocab.logits import FLOATS, check_targets, row_temperature
from megatron_rlvr.vocab.nucleus import CutRows, check_share
from megatron_rlvr.vocab.rows import Backend, Rows
from megatron_rlvr.vocab.shards import Placement, place


@dataclass(frozen=True, slots=True)
class HeadCall:
    """The arguments of a head function, checked; tensors that carry gradients are not among them.

    ``rows_R`` are the rows of the (gathered) hidden states that enter the head, ``None`` for all; ``columns_R`` and
    ``temperature_R`` belong to them.
    """

    placement: Placement
    rows_R: torch.Tensor | None
    columns_R: torch.Tensor
    temperature_R: torch.Tensor
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    extras: bool
    nucleus: float | None
    backend: Backend
    chunk_rows: int | None

    @property
    def ranks(self) -> int:
        """Number of vocabulary shards."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def slices(self, width: int, device: torch.device) -> Iterator[slice]:
        """The chunks of the rows that enter the head, at least one; the same on every rank of the group."""
        count = len(self.columns_R)
        step = self.chunk_rows or row_passes.chunk_size(count, width, device)
        return (slice(start, min(start + step, count)) for start in range(0, max(count, 1), step))


def check_call(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    rows: torch.Tensor | None,
    group: dist.ProcessGroup | None,
    temperature: float | torch.Tensor,
    vocab_size: int | None,
    shard: range | torch.Tensor | None,
    sequence_parallel: bool,
    extras: bool,
    nucleus: float | None,
    backend: Backend,
    chunk_rows: int | None,
) -> HeadCall:
    """Check the arguments of a head function; see `vocab.linear_token_stats` for what they mean."""
    if hidden.ndim != 2 or hidden.dtype not in FLOATS:
        raise ValueError(f"hidden must be a floating [T, H] tensor, got {hidden.dtype} {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [V/tp, H] with H = {hidden.shape[1]}, got {list(weight.shape)}")
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"weight is {weight.dtype} on {weight.device} but hidden {hidden.dtype} on {hidden.device}; make them equal"
        )
    if sequence_parallel and group is None:
        raise ValueError("sequence_parallel=True needs the group over which hidden is split; give group")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; give at least 1, or None for a size that suits the vocabulary")
    count = len(hidden) * (dist.get_world_size(group) if sequence_parallel and group is not None else 1)
    if rows is not None:
        if rows.dtype != torch.int64 or rows.ndim != 1 or rows.device != hidden.device:
            raise ValueError(
                f"rows must be int64 [R] on {hidden.device}, got {rows.dtype} {[*rows.shape]} {rows.device}"
            )
        count = len(rows)
    check_targets(targets, count, hidden)
    check_share(nucleus)
    placement = place(shard, len(weight), group, vocab_size)
    return HeadCall(
        placement,
        rows,
        placement.columns(targets),
        row_temperature(temperature, count, hidden),
        group,
        sequence_parallel,
        extras,
        nucleus,
        backend,
        chunk_rows,
    )


def enter(hidden_TH: torch.Tensor, call: HeadCall) -> torch.Tensor:
    """The rows that enter the head, ``[R, H]``, gathered over the sequence first where it is split."""
    if call.sequence_parallel and call.ranks > 1:
        gathered_TH = hidden_TH.new_empty(len(hidden_TH) * call.ranks, hidden_TH.shape[1])
        dist.all_gather_into_tensor(gathered_TH, hidden_TH.contiguous(), group=call.group)
        hidden_TH = gathered_TH
    return hidden_TH if call.rows_R is None else hidden_TH[call.rows_R]


def leave(grad_RH: torch.Tensor, hidden_TH: torch.Tensor, call: HeadCall) -> torch.Tensor:
    """Gradient of the hidden states as they were given, from this rank's part of that of the rows.

    This is the one reduction that any column-parallel layer owes, over the rows alone or, where the sequence is split,
    scattered.
    """
    split = call.sequence_parallel and call.ranks > 1
    if call.ranks > 1 and not split:
        dist.all_reduce(grad_RH, group=call.group)
    if call.rows_R is not None:
        rows = len(hidden_TH) * (call.ranks if split else 1)
        grad_RH = grad_RH.new_zeros(rows, hidden_TH.shape[1]).index_copy_(0, call.rows_R, grad_RH)
    if not split:
        return grad_RH
    grad_TH = torch.empty_like(hidden_TH, memory_format=torch.contiguous_format)
    dist.reduce_scatter_tensor(grad_TH, grad_RH.contiguous(), group=call.group)
    return grad_TH


class Head:
    """The real columns of one rank's output weight, with buffers for a chunk of logits.

    Half-precision products accumulate in fp32 and stay fp32 (rounding logits to bf16 costs up to 0.08 nats); on CUDA
    the GEMM does that by itself, on the CPU the operands are widened first.
    """

    def __init__(self, weight_VH: torch.Tensor, call: HeadCall) -> None:
        """Prepare for the chunks of ``call``."""
        real_VH = weight_VH[: call.placement.real].detach()
        half = real_VH.dtype in (torch.bfloat16, torch.float16)
        self._mixed = half and real_VH.is_cuda
        self._weight_VH = real_VH.float() if half and not self._mixed else real_VH
        self._masked_V = call.placement.masked_V
        width = len(real_VH)
        self.slices = list(call.slices(width, real_VH.device))
        largest = self.slices[0].stop
        chosen = row_passes.choose(call.backend, real_VH)

        def open_rows() -> Rows:
            return row_passes.open_rows(chosen, largest, width, like=real_VH, grad_dtype=self._weight_VH.dtype)

        self.rows = open_rows()
        self.nucleus = None if call.nucleus is None else CutRows(open_rows(), call.nucleus, call.group)

    def fill(self, hidden_RH: torch.Tensor) -> None:
        """Write the logits of a chunk of hidden states into the buffers of ``rows`` and ``nucleus``."""
        logits_RV = self.rows.logits[: len(hidden_RH)]
        if self._mixed:
            torch.ops.aten.mm.dtype_out(hidden_RH, self._weight_VH.t(), torch.float32, out=logits_RV)
        else:
            torch.mm(hidden_RH.to(self._weight_VH.dtype), self._weight_VH.t(), out=logits_RV)
        if self._masked_V is not None:
            logits_RV.masked_fill_(self._masked_V, -torch.inf)
        if self.nucleus is not None:
            self.nucleus.fill(logits_RV)

    def hidden_gradient(self, grad_RV: torch.Tensor) -> torch.Tensor:
        """This rank's part of the gradient of a chunk's hidden states."""
        return self._operand(grad_RV) @ self._weight_VH

    def add_weight_gradient(self, into_VH: torch.Tensor, grad_RV: torch.Tensor, hidden_RH: torch.Tensor) -> None:
        """Add a chunk's weight gradient to ``into_VH``, fp32 (fp64 for an fp64 weight)."""
        real_VH, operand_VR = into_VH[: len(self._weight_VH)], self._operand(grad_RV).t()
        if self._mixed:
            torch.ops.aten.addmm.dtype_out(real_VH, operand_VR, hidden_RH, torch.float32, out=real_VH)
        else:
            real_VH.addmm_(operand_VR, hidden_RH.to(self._weight_VH.dtype))

    def _operand(self, grad_RV: torch.Tensor) -> torch.Tensor:
        return grad_RV.to(self._weight_VH.dtype)
