"""Rows become micro-batches: every token is predicted once, by the right hidden state, whatever the cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.core import RLVRError
from megatron_rlvr.policy.micro_batches import Cut, TrainingRows, cut_micro_batch, deal, zigzag

LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=20)


def rows_of(lengths: list[int], seed: int) -> TrainingRows:
    generator = torch.Generator().manual_seed(seed)
    columns_L, lengths_B = torch.arange(max(lengths) + 3), torch.tensor(lengths)
    mask_BL = (columns_L < lengths_B[:, None]) & (torch.rand(len(lengths), len(columns_L), generator=generator) < 0.6)
    mask_BL[:, 0] = False
    tokens_BL = torch.randint(1, 1000, mask_BL.shape, generator=generator)
    return TrainingRows(tokens_BL, mask_BL, {"twice": 2.0 * tokens_BL})


@given(
    lengths=LENGTHS,
    seed=st.integers(0, 9),
    context=st.integers(1, 3),
    tensor=st.sampled_from([1, 2, 4]),
    packed=st.booleans(),
)
def test_every_token_is_predicted_by_its_predecessor(
    lengths: list[int], seed: int, context: int, tensor: int, packed: bool
) -> None:
    rows = rows_of(lengths, seed)
    members = torch.arange(len(lengths)).flip(0)[: len(lengths) // 2 + 1]
    seen_BL = torch.zeros_like(rows.mask_BL, dtype=torch.long)
    for rank in range(context):
        batch = cut_micro_batch(rows, members, Cut(context, rank, tensor), packed=packed)
        slots = batch.tokens_BS.shape[1]
        assert slots % tensor == 0
        if packed:
            assert batch.lengths is not None
            assert sum(batch.lengths) == slots * context
            assert all(length % (2 * context) == 0 or context == 1 for length in batch.lengths)
        # as sequence parallelism lays hidden states out: part by part, each [B, slots / tensor]
        laid_out = [part.flatten() for part in batch.tokens_BS.chunk(tensor, dim=1)]
        predecessors_R = torch.cat(laid_out)[batch.heads_R]
        assert torch.equal(predecessors_R, rows.tokens_BL[batch.rows_R, batch.columns_R - 1])
        assert torch.equal(
            torch.cat([part.flatten() for part in batch.positions_BS.chunk(tensor, dim=1)])[batch.heads_R],
            batch.columns_R - 1,
        )
        assert torch.equal(batch.targets_R, rows.tokens_BL[batch.rows_R, batch.columns_R])
        assert torch.equal(batch.given["twice"], 2.0 * batch.targets_R)
        seen_BL[batch.rows_R, batch.columns_R] += 1
    wanted_BL = torch.zeros_like(rows.mask_BL)
    wanted_BL[members] = rows.mask_BL[members]
    assert torch.equal(seen_BL, wanted_BL.long())


@given(lengths=LENGTHS, parts=st.integers(1, 4), tokens=st.integers(5, 90), multiple=st.integers(1, 3))
def test_dealing_by_tokens(lengths: list[int], parts: int, tokens: int, multiple: int) -> None:
    def dealt() -> list[list[torch.Tensor]]:
        return [deal(lengths, parts=parts, rank=r, rows=0, tokens=tokens, multiple=multiple) for r in range(parts)]

    try:
        ranks = dealt()
    except RLVRError:
        # a rank whose few rows are long
        assert len(lengths) < parts * multiple + (multiple - 1) * max(lengths)
        assert len(lengths) < parts or multiple > 1
        return
    assert sorted(int(row) for batches in ranks for batch in batches for row in batch) == list(range(len(lengths)))
    loads = [sum(lengths[row] for batch in batches for row in batch) for batches in ranks]
    assert max(loads) - min(loads) <= max(lengths)
    for batches in ranks:
        assert len(batches) % multiple == 0
        if sum(map(len, batches)) - len(batches) >= multiple:  # else there are no rows for more micro-batches
            assert all(len(batch) == 1 or sum(lengths[row] for row in batch) <= tokens for batch in batches)


def test_dealing_by_rows_keeps_their_order() -> None:
    batches = deal([5] * 14, parts=2, rank=1, rows=3, tokens=0, multiple=1)
    assert [batch.tolist() for batch in batches] == [[7, 8, 9], [10, 11], [12, 13]]
    batches = deal([5] * 14, parts=2, rank=0, rows=3, tokens=0, multiple=2)
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6]]
    with pytest.raises(ValueError, match="5 rows do not split over 2"):
        deal([5] * 5, parts=2, rank=0, rows=3, tokens=0, multiple=1)
    assert [len(batch) for batch in deal([5] * 5, parts=1, rank=0, rows=1, tokens=0, multiple=2)] == [2, 1, 1, 1]
    with pytest.raises(RLVRError, match=r"3 rows on 1 .* too few for 4 micro-batches"):
        deal([5] * 3, parts=1, rank=0, rows=3, tokens=0, multiple=4)


def test_zigzag_gives_every_rank_the_same_causal_work() -> None:
    parts = [zigzag(24, rank, 3) for rank in range(3)]
    assert parts[1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    assert {int((columns + 1).sum()) for columns in parts} == {100}
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
