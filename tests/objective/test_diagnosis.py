"""Each cause of a gap, caused in synthetic logits, is named; too small a gap is not."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rlvr.objective import Cause, Diagnosis, diagnose

BF16 = torch.finfo(torch.bfloat16).eps
ROWS, VOCAB = 1500, 100


def logits(seed: int, scale: float) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64), generator


def noise(size: float, generator: torch.Generator) -> torch.Tensor:
    return size * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)


def judge(
    trainer: torch.Tensor, engine: torch.Tensor, generator: torch.Generator, rows: int = ROWS, **options
) -> Diagnosis:
    """Tokens drawn from the engine's distribution, seen by both."""
    targets = torch.multinomial(engine.softmax(-1)[:, :VOCAB], 1, generator=generator)
    logprobs = trainer.log_softmax(-1)
    old, rollout = (values.log_softmax(-1).gather(1, targets)[:, 0] for values in (trainer, engine))
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    settings = {"versions": {3}, "expected_version": 3, "eps": BF16, **options}
    return diagnose(old[:rows].float(), rollout[:rows].float(), entropy[:rows].float(), **settings)


SCALES = pytest.mark.parametrize("scale", [1.0, 3.0, 6.0])


@SCALES
@pytest.mark.parametrize("ratio", [0.7, 0.9, 0.99, 1.01, 1.1, 1.5, 2.0])
def test_a_temperature(scale: float, ratio: float) -> None:
    z, generator = logits(0, scale)
    found = judge(z, z / ratio, generator)
    assert found.cause is Cause.TEMPERATURE
    assert found.temperature_ratio == pytest.approx(ratio, rel=0.01 if 0.9 <= ratio <= 1.1 else 0.03)
    assert "temperature is about" in found.sentence


@SCALES
def test_a_temperature_under_rounding(scale: float) -> None:
    z, generator = logits(1, scale)
    found = judge(z, (z / 1.05).bfloat16().double(), generator)
    assert found.cause is Cause.TEMPERATURE
    assert found.temperature_ratio == pytest.approx(1.05, rel=0.01)


@SCALES
@pytest.mark.parametrize("columns", [28, 100])
@pytest.mark.parametrize("side", ["engine", "trainer"])
@pytest.mark.parametrize("rounded", [False, True])
def test_padded_columns(scale: float, columns: int, side: str, rounded: bool) -> None:
    z, generator = logits(2, scale)
    padded = torch.cat([z, torch.zeros(ROWS, columns, dtype=torch.float64)], dim=1)
    trainer, engine = (z, padded) if side == "engine" else (padded, z)
    found = judge(trainer, engine.half().double() if rounded else engine, generator)
    if rounded and scale == 6.0:  # rows so sharp that padding is lost in the rounding
        assert found.cause is Cause.DTYPE
        return
    assert found.cause is Cause.PADDED_VOCABULARY
    assert f"as if the {side} counted" in found.sentence


@SCALES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding(scale: float, dtype: torch.dtype) -> None:
    z, generator = logits(3, scale)
    assert judge(z, z.to(dtype).double(), generator, eps=torch.finfo(dtype).eps).cause is Cause.DTYPE


@SCALES
def test_other_weights(scale: float) -> None:
    z, generator = logits(4, scale)
    for size in (0.1, 0.5, 1.0, 2.0, 4.0, 8.0):
        assert judge(z, z + noise(size, generator), generator).cause is Cause.DIFFERENT_WEIGHTS
    assert judge(z, logits(5, scale)[0], generator).cause is Cause.DIFFERENT_WEIGHTS
    # what bf16 would hide, an fp32 engine has no excuse for
    assert judge(z, z + noise(0.01, generator), generator, eps=1.2e-7).cause is Cause.DIFFERENT_WEIGHTS


@SCALES
def test_small_gaps_are_rounding_or_nothing(scale: float) -> None:
    z, generator = logits(6, scale)
    assert judge(z, z + noise(1e-2, generator), generator).cause is Cause.DTYPE
    assert judge(z, z + noise(1e-3, generator), generator).cause is Cause.DTYPE
    assert judge(z, z + noise(1e-5, generator), generator).cause is Cause.NONE
    assert judge(z, z / 1.000001, generator).cause is Cause.NONE


def test_a_stale_version_is_said_first_but_not_without_a_gap() -> None:
    z, generator = logits(7, 2.0)
    found = judge(z, z / 1.3, generator, versions={2, 3})
    assert found.cause is Cause.STALE_VERSION
    assert "versions [2] where 3" in found.sentence
    assert judge(z, z, generator, versions={2}).cause is Cause.NONE


def test_few_tokens_and_none() -> None:
    z, generator = logits(8, 2.0)
    assert judge(z, z / 1.3, generator, rows=31).cause is Cause.UNDECIDED
    assert judge(z, z / 1.3, generator, rows=0).cause is Cause.NONE


def test_degenerate_tokens_do_not_divide_by_zero() -> None:
    same = torch.full((64,), -1.0)
    settings = {"versions": [], "expected_version": 0, "eps": BF16}
    assert diagnose(same, same + 0.2, torch.ones(64), **settings).cause is Cause.PADDED_VOCABULARY
    broken = torch.cat([same[1:], torch.tensor([math.nan])])
    assert diagnose(same, broken, torch.ones(64), **settings).cause is Cause.DIFFERENT_WEIGHTS
