"""What Megatron-Core's own layers, used where TransformerEngine is not, lack for sequence and context parallelism."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlvr.policy.micro_batches import zigzag


class LocalNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight asks Megatron-Core to add up its gradient over the ranks that split the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """As Megatron-Core's layer specs call a norm."""
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LocalAttention(MegatronModule):  # type: ignore[misc]
    """Causal scaled dot-product attention of padded or packed sequences, under context parallelism too.

    Keys and values are gathered over the context-parallel ranks (their gradients are scattered back); every rank
    attends with the queries that it has.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        """As Megatron-Core's layer specs call a core attention."""
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Context ``[S, B, heads * D]``, or ``[S, heads * D]`` of packed sequences.

        Args:
            query: ``[S, B, heads, D]``, packed ``[S, heads, D]``, this rank's slots.
            key: ``[S, B, groups, D]``, packed ``[S, groups, D]``.
            value: As ``key``.
            attention_mask: Always None: attention is causal, and what follows a sequence is never looked at.
            attn_mask_type: Always causal.
            attention_bias: Always None.
            packed_seq_params: Where packed sequences start, counted over all context-parallel ranks.
        """
        group = parallel_state.get_context_parallel_group()
        parts, rank = group.size(), group.rank()
        gathered = [
            gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=group)
            for tensor in (key, value)
        ]
        keys, values = (tensor.unflatten(0, (parts, -1)) for tensor in gathered)
        if packed_seq_params is None:
            return self._attend(query, keys, values, rank).flatten(2)
        ends = (packed_seq_params.cu_seqlens_q // parts).tolist()
        contexts = [
            self._attend(query[start:end, None], keys[:, start:end, None], values[:, start:end, None], rank)
            for start, end in itertools.pairwise(ends)
        ]
        return torch.cat(contexts).flatten(1)

    def _attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rank: int) -> torch.Tensor:
        """Queries ``[s, b, n, d]`` over keys and values ``[parts, s, b, g, d]``, in the order of the ranks."""
        parts, length = keys.shape[0], keys.shape[0] * keys.shape[1]
        mask = None
        if parts > 1:
            places = torch.cat([zigzag(length, part, parts) for part in range(parts)])
            mask = places <= zigzag(length, rank, parts)[:, None]
        context = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            keys.flatten(0, 1).permute(1, 2, 0, 3),
            values.flatten(0, 1).permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=True,
        )
        return context.permute(2, 0, 1, 3)
