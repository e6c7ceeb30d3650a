"""The correction for trainer and engine, by hand at every level, and the rules by name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_rlvr.core import RLVRError
from megatron_rlvr.objective import MISMATCHES, MismatchSettings, mismatch

# two responses of three and two tokens, and one without any
RATIOS = [[0.4, 1.0, 3.0], [1.5, 1.2, 1.0], [1.0, 1.0, 1.0]]
MASK = [[True, True, True], [True, True, False], [False] * 3]


def run(settings: MismatchSettings, ratios=RATIOS, mask=MASK, garbage: float = 0.0):
    mask_BL = torch.tensor(mask)
    old_BL = torch.tensor(ratios, dtype=torch.float64).log() - 2.0
    rollout_BL = torch.full_like(old_BL, -2.0).masked_fill(~mask_BL, garbage)
    weight_BL, keep_BL, metrics = mismatch(old_BL.masked_fill(~mask_BL, garbage), rollout_BL, mask_BL, settings)
    assert not weight_BL[~keep_BL].any()
    return weight_BL.tolist(), keep_BL.tolist(), {name: (float(s), int(n)) for name, (s, n) in metrics.items()}


@pytest.mark.parametrize("garbage", [0.0, math.nan, math.inf, -math.inf])
def test_tis_by_hand(garbage: float) -> None:
    weight, keep, metrics = run(MISMATCHES["tis"], garbage=garbage)
    assert weight == [pytest.approx([0.4, 1.0, 2.0]), pytest.approx([1.5, 1.2, 0.0]), [0.0] * 3]
    assert keep == MASK
    assert metrics == {
        "mismatch_weight": (pytest.approx(6.1), 5),
        "mismatch_low_fraction": (0.0, 5),
        "mismatch_high_fraction": (1.0, 5),
        "mismatch_dropped": (0.0, 5),
        "mismatch_veto_fraction": (0.0, 2),
    }
    assert run(replace(MISMATCHES["tis"], low=0.5))[0][0] == pytest.approx([0.5, 1.0, 2.0])


def test_icepop_by_hand() -> None:
    weight, keep, metrics = run(MismatchSettings("token", "mask", 0.5, 2.0))
    assert weight == [pytest.approx([0.0, 1.0, 0.0]), pytest.approx([1.5, 1.2, 0.0]), [0.0] * 3]
    assert keep == [[False, True, False], [True, True, False], [False] * 3]
    assert metrics["mismatch_dropped"] == (2.0, 5)
    assert metrics["mismatch_low_fraction"] == metrics["mismatch_high_fraction"] == (1.0, 5)


def test_sequence_and_geometric_levels_by_hand() -> None:
    product, mean = 1.5 * 1.2, math.sqrt(1.5 * 1.2)
    first = 0.4 * 3.0
    weight, _, _ = run(MismatchSettings("sequence", "truncate", 0.0, 1.5))
    assert weight == [pytest.approx([first] * 3), pytest.approx([1.5, 1.5, 0.0]), [0.0] * 3]
    weight, keep, metrics = run(MismatchSettings("sequence", "mask", 0.5, 1.5))
    assert weight == [pytest.approx([first] * 3), [0.0] * 3, [0.0] * 3]
    assert keep[1] == [False] * 3
    assert metrics["mismatch_high_fraction"] == (2.0, 5)
    weight, _, _ = run(MismatchSettings("geometric", "mask", 0.9, 2.0))
    assert weight == [pytest.approx([first ** (1 / 3)] * 3), pytest.approx([mean, mean, 0.0]), [0.0] * 3]
    assert run(MismatchSettings("sequence", "truncate", 0.0, 2.0))[0][1] == pytest.approx([product, product, 0.0])


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_one_token_vetoes_its_response(mode: str) -> None:
    settings = MismatchSettings("token", mode, 0.0, 2.0, veto=1e-4)
    weight, _, metrics = run(settings, ratios=[[1.0, 0.9e-4, 1.0], [1.0, 1.1e-4, 0.1e-4], [1e-9] * 3])
    assert weight == [[0.0] * 3, pytest.approx([1.0, 1.1e-4, 0.0]), [0.0] * 3]
    assert metrics["mismatch_veto_fraction"] == (1.0, 2)
    assert metrics["mismatch_dropped"] == (3.0, 5)


def test_the_veto_looks_at_tokens_at_every_level() -> None:
    ratios = [[1e4, 0.5e-4, 2.0], [1.0, 1.0, 1.0], [1.0] * 3]
    for level in ("token", "sequence", "geometric"):
        weight, _, _ = run(MismatchSettings(level, "truncate", 0.0, 2.0, veto=1e-4), ratios=ratios)
        assert weight == [[0.0] * 3, [1.0, 1.0, 0.0], [0.0] * 3]


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_no_gap_is_no_correction(level: str) -> None:
    weight, keep, _ = run(MismatchSettings(level, "mask", 0.999, 1.001, veto=1e-4), ratios=[[1.0] * 3] * 3)
    assert torch.equal(torch.tensor(weight), torch.tensor(MASK).float())
    assert keep == MASK


def test_ratios_that_overflow_are_bounded() -> None:
    old, rollout = torch.zeros(1, 4), torch.full((1, 4), -500.0)
    for level in ("token", "sequence", "geometric"):
        weight, _, _ = mismatch(old, rollout, torch.ones(1, 4, dtype=torch.bool), MismatchSettings(level))
        assert weight.tolist() == [pytest.approx([2.0] * 4)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"level": "word"}, "mismatch level is 'word'"),
        ({"mode": "clip"}, "mismatch mode is 'clip'"),
        ({"low": 3.0}, r"bounds are 3\.0 to 2\.0"),
        ({"low": -1.0}, r"bounds are -1\.0 to"),
        ({"high": math.inf}, "bounds are 0.0 to inf"),
        ({"high": math.nan}, "bounds are 0.0 to nan"),
        ({"veto": 1.0}, r"veto is 1\.0"),
    ],
)
def test_bad_settings_are_refused(change: dict, words: str) -> None:
    with pytest.raises(RLVRError, match=words):
        MismatchSettings(**change)
