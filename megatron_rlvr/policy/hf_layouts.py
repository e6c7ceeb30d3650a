"""How Hugging Face tensors and Megatron's tensor-parallel shards turn into each other.

A `Layout` says how one Megatron parameter is made of Hugging Face tensors: `shard` cuts one rank's share out of them,
reading no more than that, and `merge` is its inverse. Loading, saving and weight resync all go through these pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_rlvr.policy.architecture import padded_vocab

_Index = slice | tuple[slice, ...]


class Source(Protocol):
    """A tensor that may still lie in a file: indexing reads what is asked for."""

    @property
    def shape(self) -> torch.Size:
        """Its full shape."""
        ...

    def __getitem__(self, index: _Index, /) -> torch.Tensor:
        """The part at ``index``."""
        ...


class Layout(Protocol):
    """How the shards of one Megatron parameter and its Hugging Face tensors turn into each other."""

    def shard(self, sources: Sequence[Source], rank: int, parts: int) -> torch.Tensor:
        """What tensor-parallel rank ``rank`` of ``parts`` holds."""
        ...

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The full Hugging Face tensors of all ranks' shards, in rank order."""
        ...


class Replicated:
    """The same tensor on every rank (norms)."""

    def shard(self, sources: Sequence[Source], rank: int, parts: int) -> torch.Tensor:
        """See `Layout.shard`."""
        return sources[0][:]

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Layout.merge`."""
        return [shards[0]]


class Columns:
    """A matrix cut along its input columns."""

    def shard(self, sources: Sequence[Source], rank: int, parts: int) -> torch.Tensor:
        """See `Layout.shard`."""
        return sources[0][:, _share(sources[0].shape[1], rank, parts)]

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Layout.merge`."""
        return [torch.cat(list(shards), 1)]


@dataclass(frozen=True)
class VocabRows:
    """Embedding or head: rows cut over the ranks after zero rows fill the vocabulary up to a multiple of them."""

    vocab_size: int

    def shard(self, sources: Sequence[Source], rank: int, parts: int) -> torch.Tensor:
        """See `Layout.shard`."""
        rows = padded_vocab(self.vocab_size, parts) // parts
        start, stop = (min(end * rows, self.vocab_size) for end in (rank, rank + 1))
        return torch.nn.functional.pad(sources[0][start:stop], (0, 0, 0, rows - (stop - start)))

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Layout.merge`."""
        return [torch.cat(list(shards))[: self.vocab_size]]


class GateUp:
    """``linear_fc1``: every rank holds its gate rows, then its up rows."""

    def shard(self, sources: Sequence[Source], rank: int, parts: int) -> torch.Tensor:
        """See `Layout.shard`."""
        return torch.cat([source[_share(source.shape[0], rank, parts)] for source in sources])

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Layout.merge`."""
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in (0, 1)]


@dataclass(frozen=True)
class QKV:
    """``linear_qkv``, weight or bias: for every query group its query heads, then its key head, then its value head."""

    query_heads: int
    kv_heads: int
    head_dim: int

    def shard(self, sources: Sequence[Source], rank: int, parts: int) -> torch.Tensor:
        """See `Layout.shard`."""
        own = [source[_share(source.shape[0], rank, parts)] for source in sources]
        grouped = [tensor.reshape(self.kv_heads // parts, -1, *tensor.shape[1:]) for tensor in own]
        return torch.cat(grouped, 1).flatten(0, 1)

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Layout.merge`."""
        query = self.query_heads // self.kv_heads * self.head_dim
        whole = torch.cat(list(shards))
        grouped = whole.reshape(self.kv_heads, query + 2 * self.head_dim, *whole.shape[1:])
        return [part.flatten(0, 1) for part in torch.split(grouped, [query, self.head_dim, self.head_dim], 1)]


def _share(size: int, rank: int, parts: int) -> slice:
    return slice(rank * (size // parts), (rank + 1) * (size // parts))
