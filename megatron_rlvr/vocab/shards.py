"""Which token ids a rank's columns hold, and how the ranks' row states become one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_rlvr.vocab.state import RowState, merge, unpack


@dataclass(frozen=True, slots=True)
class Placement:
    """The columns of one rank.

    Attributes:
        real: Columns from here on are padding.
        masked_V: True at columns before ``real`` that are padding all the same; ``None`` where there are none.
        ids_V: Sorted token ids of the columns where these are not consecutive, else ``None``.
        order_V: The column of each of ``ids_V``.
        first: Token id of column 0 where ids are consecutive.
    """

    real: int
    first: int = 0
    masked_V: torch.Tensor | None = None
    ids_V: torch.Tensor | None = None
    order_V: torch.Tensor | None = None

    def columns(self, targets_T: torch.Tensor) -> torch.Tensor:
        """Column of each target id, outside ``[0, real)`` where this rank does not hold it."""
        if self.ids_V is None or self.order_V is None:
            return targets_T - self.first
        found_T = torch.searchsorted(self.ids_V, targets_T).clamp(max=len(self.ids_V) - 1)
        return torch.where(self.ids_V[found_T] == targets_T, self.order_V[found_T], -1)


def place(
    shard: range | torch.Tensor | None, width: int, group: dist.ProcessGroup | None, vocab_size: int | None
) -> Placement:
    """The placement of ``width`` columns.

    Args:
        shard: Token ids of the columns: a range of step 1, an int64 tensor ``[width]`` of distinct ids in any order, or
            ``None`` for the rank-th of equal parts.
        width: Number of columns of this rank.
        group: Ranks over which the vocabulary is sharded.
        vocab_size: Ids at or above it are padding; ``None`` when there is no padding.

    Raises:
        ValueError: If the sizes contradict one another.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}; it counts the real tokens, so give at least 1")
    if shard is None:
        if vocab_size is not None and vocab_size > width * ranks:
            raise ValueError(f"vocab_size must lie in 1..{width * ranks} ({ranks} shards of {width}), got {vocab_size}")
        rank = 0 if group is None else dist.get_rank(group)
        shard = range(rank * width, (rank + 1) * width)
    if isinstance(shard, range):
        if shard.step != 1 or len(shard) != width or (width and shard.start < 0):
            raise ValueError(f"shard is {shard} but this rank has {width} columns; give range(first, first + {width})")
        real = width if vocab_size is None else min(max(vocab_size - shard.start, 0), width)
        return Placement(real, shard.start)
    if shard.shape != (width,) or shard.dtype != torch.int64:
        raise ValueError(f"shard must be int64 [{width}], one id for each column, got {shard.dtype} {[*shard.shape]}")
    if width == 0:
        return Placement(0)
    ids_V, order_V = shard.sort()
    if vocab_size is None:
        return Placement(width, 0, None, ids_V, order_V)
    return Placement(width, 0, shard >= vocab_size, ids_V, torch.where(ids_V < vocab_size, order_V, -1))


def over_ranks(state_TK: torch.Tensor, temperature_T: torch.Tensor, group: dist.ProcessGroup | None) -> RowState:
    """State of the whole rows: one all-gather, merged in rank order so that every rank holds the same bits."""
    if group is None or dist.get_world_size(group) == 1:
        return unpack(state_TK)
    gathered = [torch.empty_like(state_TK) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, state_TK.contiguous(), group=group)
    return functools.reduce(lambda a, b: merge(a, b, temperature_T), map(unpack, gathered))
