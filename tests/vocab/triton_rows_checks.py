"""The Triton row kernels against float64: on a GPU where there is one, else in Triton's interpreter.

Not collected by its name: `test_vocab_triton.py` runs it in a process that has Triton.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch

from megatron_rlvr.vocab import triton_rows
from megatron_rlvr.vocab.state import finish, merge, unpack

INF = math.inf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# one column · less than a block · a block of the narrow launch · a tail alone · blocks and a tail · blocks alone
WIDTHS = [1, 7, 1024, 1500, 9001, 8192]
SOME_WIDTHS = [7, 9001]


class Rows(NamedTuple):
    logits: torch.Tensor
    columns: torch.Tensor
    temperature: torch.Tensor


def rows_of(width: int, dtype: torch.dtype, seed: int = 0) -> Rows:
    """One row of each kind that has ever gone wrong somewhere, with targets inside, outside and impossible."""
    generator = torch.Generator().manual_seed(seed)
    plain = 3.0 * torch.randn(width, generator=generator)
    index = torch.arange(width)
    step = torch.randint(width, (), generator=generator)
    kinds = {
        "plain": plain,
        "raised": plain + 1e4,
        "lowered": plain - 1e4,
        "below-zero": plain - 250.0,
        "uniform": torch.full((width,), 2.5),
        "tied": torch.where(index % 5 == 3, plain.max(), plain),
        "tied-late": torch.where(index >= width - 2, plain.max() + 1.0, plain),
        "rising": index / width * 40.0,
        "falling": index / width * -40.0,
        "masked": plain.masked_fill(index % 3 == 1, -INF),
        "masked-head": plain.masked_fill(index < width // 2, -INF),
        "masked-tail": plain.masked_fill(index > width // 2, -INF),
        "masked-but-one": plain.masked_fill(index != step, -INF),
        "void": torch.full((width,), -INF),
        "lowest": plain.masked_fill(index % 2 == 1, torch.finfo(dtype).min),
        "certain": torch.where(index == step, plain.max() + 22.0, plain),
        "certain-first": torch.where(index == 0, plain.max() + 18.0, plain),
        "certain-last": torch.where(index == width - 1, plain.max() + 14.0, plain),
    }
    logits = torch.stack(list(kinds.values())).to(dtype)
    columns = torch.randint(width, (len(logits),), generator=generator)
    columns[9], columns[15] = min(1, width - 1), step
    columns[0], columns[4], columns[16] = -100, width, 2**32  # 32 bits of the last are 0
    temperature = torch.linspace(0.6, 1.7, len(logits))
    temperature[::3] = 1.0
    return Rows(logits.to(DEVICE), columns.to(DEVICE), temperature.to(DEVICE))


class Oracle(NamedTuple):
    state: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor
    probs: torch.Tensor
    logp: torch.Tensor


def oracle(rows: Rows) -> Oracle:
    """Float64, one sorted sum per quantity, around the maximum so that almost certain rows are exact too."""
    z, tau = rows.logits.double().cpu(), rows.temperature.double().cpu()[:, None]
    void = (z == -INF).all(dim=1)
    top = z.max(dim=1, keepdim=True).values.masked_fill(void[:, None], 0.0)
    u = ((z - top) / tau).clamp(min=-1e4)
    e = u.exp()
    others = e.scatter(1, z.argmax(dim=1, keepdim=True), 0.0)
    columns = rows.columns.cpu()
    own = (columns >= 0) & (columns < z.shape[1])
    target = z.gather(1, columns.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    target = torch.where(own, target, -INF)
    rest, centred = others.sum(1), (u * e).sum(1)
    sums = [(u * u * e).sum(1), (others * others).sum(1), (u * e * e).sum(1), (u * u * e * e).sum(1)]
    state = torch.stack([top[:, 0], rest, centred, target, *sums], dim=1)
    state[void] = torch.tensor([-INF, -1.0, 0.0, -INF, 0.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    logp = (u - rest.log1p()[:, None]).masked_fill(z == -INF, -INF)
    logprob = torch.where(own, logp.gather(1, columns.clamp(0, z.shape[1] - 1)[:, None])[:, 0], -INF)
    return Oracle(state, logprob, rest.log1p() - centred / (1.0 + rest), logp.exp(), logp)


def assert_state(got: torch.Tensor, truth: torch.Tensor, rtol: float = 3e-6) -> None:
    assert got.dtype == FP32
    assert torch.equal(got[:, (0, 3)].double().cpu(), truth[:, (0, 3)])
    torch.testing.assert_close(got.double().cpu(), truth[:, : got.shape[1]], rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [*((FP32, width) for width in WIDTHS), *((dtype, width) for dtype in (BF16, FP16) for width in SOME_WIDTHS)],
    ids=str,
)
def test_state(dtype: torch.dtype, width: int, extras: bool) -> None:
    rows = rows_of(width, dtype)
    state = triton_rows.shard_state(*rows, extras)
    assert state.shape == (len(rows.logits), 8 if extras else 4)
    assert_state(state, oracle(rows).state)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_entropy_is_relatively_exact_down_to_1e_8(offset: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(24, 5000, generator=generator)
    logits[torch.arange(24), torch.arange(24) * 200] += temperature * torch.linspace(0.0, 32.0, 24)
    tau = torch.full((24,), temperature)
    rows = Rows((logits + offset).to(DEVICE), torch.arange(24).to(DEVICE) * 200, tau.to(DEVICE))
    truth = oracle(rows)
    stats = finish(unpack(triton_rows.shard_state(*rows, False)), rows.temperature)
    tested = truth.entropy >= 1e-8
    assert truth.entropy[tested].min() < 1e-6
    error = (stats.entropy.double().cpu() - truth.entropy).abs() / truth.entropy
    assert error[tested].max() <= 1e-6
    torch.testing.assert_close(stats.logprob.double().cpu()[tested], truth.logprob[tested], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("place", [0, 1023, 4095, 4096, 8999])
@pytest.mark.parametrize("poison", [math.nan, INF])
def test_a_row_without_a_distribution_is_nan_and_stays_alone(poison: float, place: int) -> None:
    logits = torch.randn(3, 9000, generator=torch.Generator().manual_seed(2))
    logits[1, place] = poison
    columns = torch.tensor([5, 5, 5])
    state = triton_rows.shard_state(logits.to(DEVICE), columns.to(DEVICE), torch.ones(3, device=DEVICE), True).cpu()
    assert state[1, [0, 1, 2, 4, 5, 6, 7]].isnan().all()
    assert state[1, 3] == logits[1, 5]
    assert state[[0, 2]].isfinite().all()


def test_no_rows_and_no_columns() -> None:
    columns, tau = torch.zeros(2, dtype=torch.long, device=DEVICE), torch.ones(2, device=DEVICE)
    state = triton_rows.shard_state(torch.zeros(2, 0, device=DEVICE), columns, tau, True)
    assert state.tolist() == [[-INF, -1.0, 0.0, -INF, 0.0, -1.0, 0.0, 0.0]] * 2
    none = torch.zeros(0, 5, device=DEVICE)
    assert triton_rows.shard_state(none, columns[:0], tau[:0], False).shape == (0, 4)
    triton_rows.write_gradient_(none, none, columns[:0], *[tau[:0]] * 7)
    empty = torch.zeros(2, 0, device=DEVICE)
    triton_rows.write_gradient_(empty, empty, columns, *[tau] * 7)


@pytest.mark.parametrize("width", [1000, 9001])
def test_padding_between_rows_is_neither_read_nor_written(width: int) -> None:
    rows = rows_of(width, FP32)
    buffer = torch.full((len(rows.logits), width + 17), math.nan, device=DEVICE)
    logits = buffer[:, :width].copy_(rows.logits)
    assert_state(triton_rows.shard_state(logits, rows.columns, rows.temperature, True), oracle(rows).state)
    out = torch.full_like(buffer, math.nan)
    expected = gradient_into(torch.empty_like(rows.logits), rows)
    assert torch.equal(gradient_into(out[:, :width], rows._replace(logits=logits)), expected)
    assert out[:, width:].isnan().all()
    gradient_into(logits, rows._replace(logits=logits))
    assert torch.equal(logits, expected)
    assert buffer[:, width:].isnan().all()


@pytest.mark.parametrize("cuts", [(0, 1, 700, 5000), (2500, 2501, 2501, 5000)])
def test_states_of_shards_merge_to_the_whole(cuts: tuple[int, ...]) -> None:
    rows = rows_of(5000, FP32)
    merged = unpack(triton_rows.shard_state(rows.logits[:, : cuts[0]], rows.columns, rows.temperature, True))
    for start, end in itertools.pairwise(cuts):
        part = triton_rows.shard_state(rows.logits[:, start:end], rows.columns - start, rows.temperature, True)
        merged = merge(merged, unpack(part), rows.temperature)
    assert merged.moments is not None
    assert_state(torch.stack([*merged[:4], *merged.moments], dim=1), oracle(rows).state)


def upstream(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    g, h = torch.randn(2, len(rows.logits), generator=generator)
    return g.masked_fill(oracle(rows).logprob == -INF, 0.0), h


def gradient_into(out: torch.Tensor, rows: Rows) -> torch.Tensor:
    truth = oracle(rows)
    g, h = upstream(rows)
    log_mass = torch.where(truth.state[:, 1] < 0, 0.0, truth.state[:, 1].log1p())
    per_row = torch.stack([truth.state[:, 0], log_mass, truth.entropy, truth.logprob, g, h], dim=1).float().to(DEVICE)
    triton_rows.write_gradient_(out, *rows, *per_row.unbind(dim=1))
    return out


def true_gradient(rows: Rows) -> torch.Tensor:
    truth = oracle(rows)
    g, h = (grad.double()[:, None] for grad in upstream(rows))
    hot = torch.arange(rows.logits.shape[1]) == rows.columns.cpu()[:, None]
    surprise = torch.where(truth.probs > 0, truth.logp + truth.entropy[:, None], 0.0)
    own = torch.where(hot, g, 0.0)
    grad = (own - g * truth.probs - h * truth.probs * surprise) / rows.temperature.double().cpu()[:, None]
    return grad.masked_fill(rows.logits.cpu() == -INF, 0.0)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(BF16, None), (FP16, None), (FP32, None), (FP32, BF16), (BF16, FP32), (FP32, FP16)],
    ids=str,
)
@pytest.mark.parametrize("width", WIDTHS)
def test_gradient(dtype: torch.dtype, out_dtype: torch.dtype | None, width: int) -> None:
    rows = rows_of(width, dtype)
    in_place = rows._replace(logits=rows.logits.clone())
    if out_dtype is None:
        out = gradient_into(in_place.logits, in_place)
    else:
        out = gradient_into(torch.full_like(rows.logits, math.nan, dtype=out_dtype), rows)
    rounding = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double().cpu(), true_gradient(rows), rtol=max(rounding, 3e-6), atol=1e-6)
    assert not out[rows.logits == -INF].any()


def test_gradient_of_an_almost_certain_target_keeps_its_digits() -> None:
    gaps = torch.tensor([0.3, 1.0, 3.0, 9.0, 16.0, 30.0], dtype=torch.float64)
    logits = torch.stack([gaps, torch.zeros(6)], dim=1).float().to(DEVICE)
    logprob = -torch.log1p((-gaps).exp())
    per_row = torch.stack([gaps, -logprob, torch.zeros(6), logprob, torch.ones(6), torch.zeros(6)]).float().to(DEVICE)
    columns = torch.zeros(6, dtype=torch.long, device=DEVICE)
    triton_rows.write_gradient_(logits, logits, columns, torch.ones(6, device=DEVICE), *per_row)
    other = 1.0 / (1.0 + gaps.exp())
    torch.testing.assert_close(logits.double().cpu(), torch.stack([other, -other], dim=1), rtol=2e-6, atol=0.0)


def test_what_the_kernels_cannot_read_is_refused() -> None:
    columns, tau = torch.zeros(3, dtype=torch.long), torch.ones(3)
    with pytest.raises(ValueError, match=r"take bf16, fp16 or fp32, got torch\.float64"):
        triton_rows.shard_state(torch.zeros(3, 4, dtype=torch.float64), columns, tau, False)
    with pytest.raises(ValueError, match="need adjacent columns"):
        triton_rows.shard_state(torch.zeros(4, 3).T, columns, tau, False)
    with pytest.raises(ValueError, match="must have the shape of the logits"):
        triton_rows.write_gradient_(torch.zeros(3, 5), torch.zeros(3, 4), columns, *[tau] * 7)
