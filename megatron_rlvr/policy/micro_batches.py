"""How the rows of a global batch become one rank's micro-batches, and which hidden state predicts which token.

Rows are dealt to data-parallel ranks and cut into micro-batches of a number of rows, padded to one length, or of a
number of tokens, packed one behind the other. Context parallelism gives each of its ranks two chunks of every sequence,
one from either end (``zigzag``), so that causal attention costs all of them the same.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rlvr.core import RLVRError


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Rows of a global (mini-)batch, identical on every rank.

    Attributes:
        tokens_BL: Token ids, right-padded, ``int64``.
        mask_BL: True at response tokens that take part in the loss, ``bool``; never in the first column.
        given: What the loss is told of each token, ``float32 [B, L]``, under the names that `LossInputs` gives them.
    """

    tokens_BL: torch.Tensor
    mask_BL: torch.Tensor
    given: dict[str, torch.Tensor]

    def select(self, rows: torch.Tensor) -> TrainingRows:
        """The rows with the given indices or slice mask."""
        given = {name: value_BL[rows] for name, value_BL in self.given.items()}
        return TrainingRows(self.tokens_BL[rows], self.mask_BL[rows], given)

    def lengths(self) -> list[int]:
        """Tokens of each row up to its last response token; causal attention never sees what follows."""
        columns_L = torch.arange(1, self.mask_BL.shape[1] + 1)
        lengths: list[int] = (self.mask_BL * columns_L).amax(1).clamp(min=1).tolist()
        return lengths


@dataclass(frozen=True, slots=True)
class Cut:
    """How sequences are cut over the ranks that share a micro-batch.

    Attributes:
        context: Context-parallel ranks.
        rank: This one's place among them.
        tensor: Tensor-parallel ranks that the hidden states are split over; 1 without sequence parallelism.
        slots: A context-parallel rank's token slots are a multiple of this.
    """

    context: int = 1
    rank: int = 0
    tensor: int = 1
    slots: int = 1

    @property
    def chunks(self) -> int:
        """A sequence's length has to be a multiple of this."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def multiple(self) -> int:
        """A micro-batch's length, over all ranks, has to be a multiple of this."""
        return self.context * math.lcm(self.chunks * self.tensor // self.context, self.slots)

    def columns(self, length: int) -> torch.Tensor:
        """This rank's columns of a sequence."""
        return zigzag(length, self.rank, self.context)


def zigzag(length: int, rank: int, parts: int) -> torch.Tensor:
    """The columns that context-parallel rank ``rank`` of ``parts`` has of a sequence, ``[length / parts]``."""
    if parts == 1:
        return torch.arange(length)
    chunks = torch.arange(length).view(2 * parts, -1)
    return torch.cat([chunks[rank], chunks[2 * parts - 1 - rank]])


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One rank's part of a micro-batch: S slots for each of B rows, or one row of slots when packed.

    Attributes:
        tokens_BS: Token ids, 0 in padding, ``int64``.
        positions_BS: Their columns in their rows.
        lengths: Padded lengths of packed sequences over all context-parallel ranks; None where not packed.
        heads_R: Which hidden states predict a response token: indices into the flattened ones, which sequence
            parallelism leaves in the order of its ranks.
        rows_R: Row of each of these tokens in the global batch.
        columns_R: Its column there.
        targets_R: Its id.
        given: What the loss is told of it.
    """

    tokens_BS: torch.Tensor
    positions_BS: torch.Tensor
    lengths: tuple[int, ...] | None
    heads_R: torch.Tensor
    rows_R: torch.Tensor
    columns_R: torch.Tensor
    targets_R: torch.Tensor
    given: dict[str, torch.Tensor]


def cut_micro_batch(rows: TrainingRows, members: torch.Tensor, cut: Cut, *, packed: bool) -> MicroBatch:
    """This rank's part of the micro-batch of the rows with the indices ``members``."""
    used = rows.select(members).lengths()
    if packed:
        lengths = _packed_lengths(used, cut)
        row_BS = torch.cat([row.expand(n // cut.context) for row, n in zip(members, lengths, strict=True)])[None]
        column_BS = torch.cat([cut.columns(n) for n in lengths])[None]
    else:
        lengths = []
        columns_S = cut.columns(_up(max(used), cut.multiple))
        row_BS = members[:, None].expand(-1, len(columns_S))
        column_BS = columns_S.expand_as(row_BS)
    width = rows.tokens_BL.shape[1]
    tokens_BS = rows.tokens_BL[row_BS, column_BS.clamp(max=width - 1)].masked_fill(column_BS >= width, 0)
    next_BS = column_BS + 1
    predicts_BS = (next_BS < width) & rows.mask_BL[row_BS, next_BS.clamp(max=width - 1)]
    b_R, s_R = predicts_BS.nonzero(as_tuple=True)
    rows_R, columns_R = row_BS[b_R, s_R], next_BS[b_R, s_R]
    slots = tokens_BS.shape[1] // cut.tensor
    return MicroBatch(
        tokens_BS=tokens_BS,
        positions_BS=column_BS,
        lengths=tuple(lengths) if packed else None,
        heads_R=(s_R // slots * len(tokens_BS) + b_R) * slots + s_R % slots,
        rows_R=rows_R,
        columns_R=columns_R,
        targets_R=rows.tokens_BL[rows_R, columns_R],
        given={name: value_BL[rows_R, columns_R] for name, value_BL in rows.given.items()},
    )


def _packed_lengths(used: list[int], cut: Cut) -> list[int]:
    lengths = [_up(length, cut.chunks) for length in used]
    # The hidden states split over tensor parallelism as a whole, so one sequence's padding is enough for that.
    lengths[-1] += _up(sum(lengths), cut.multiple) - sum(lengths)
    return lengths


def deal(lengths: Sequence[int], *, parts: int, rank: int, rows: int, tokens: int, multiple: int) -> list[torch.Tensor]:
    """The micro-batches of one data-parallel rank, as indices of rows.

    Args:
        lengths: Tokens of each row of the global batch.
        parts: Data-parallel ranks.
        rank: This one.
        rows: Most rows in a micro-batch, where ``tokens`` is 0; rows then stay in order.
        tokens: Most tokens in a micro-batch; a longer row gets one of its own. Ranks and micro-batches are balanced.
        multiple: The number of micro-batches is a multiple of this, even if too few rows then make them larger.

    Raises:
        ValueError: If ``tokens`` is 0 and the rows do not split over the ranks.
        RLVRError: If a rank gets fewer rows than ``multiple``.
    """
    if tokens:
        members = _balanced(lengths, range(len(lengths)), parts)[rank]
        least = -(-sum(lengths[row] for row in members) // tokens)
    else:
        share = len(lengths) // parts
        if share * parts != len(lengths):
            raise ValueError(f"{len(lengths)} rows do not split over {parts} data-parallel ranks")
        members = list(range(rank * share, (rank + 1) * share))
        least = -(-share // rows)
    most = len(members) // multiple * multiple
    if most == 0:
        raise RLVRError(
            f"{len(lengths)} rows on {parts} data-parallel ranks are too few for {multiple} micro-batches on each; "
            "raise rollout.prompts or lower policy.pipeline_parallel"
        )
    count = min(_up(least, multiple), most)
    if not tokens:
        return list(torch.tensor(members).tensor_split(count))
    while count < most and not _fit(lengths, _balanced(lengths, members, count), tokens):
        count += multiple
    return [torch.tensor(sorted(part)) for part in _balanced(lengths, members, count)]


def _fit(lengths: Sequence[int], bins: list[list[int]], tokens: int) -> bool:
    return all(len(part) < 2 or sum(lengths[row] for row in part) <= tokens for part in bins)


def _balanced(lengths: Sequence[int], members: Sequence[int], bins: int) -> list[list[int]]:
    """Longest first, each to the bin with the fewest tokens (LPT, Graham 1969: within 4/3 of the best)."""
    heap: list[tuple[int, int, list[int]]] = [(0, place, []) for place in range(bins)]
    for row in sorted(members, key=lambda row: -lengths[row]):
        total, place, part = heapq.heappop(heap)
        part.append(row)
        heapq.heappush(heap, (total + lengths[row], place, part))
    return [part for _, _, part in sorted(heap, key=lambda entry: entry[1])]


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
