"""The parts of the objective and of entropy control together, in every layout: the same decisions, metrics, weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_models import random_batch, write_odd_model
from policy_ranks import run_ranks

LR = 1e-3
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"micro_batch": 8},
    "tp1_single_rows": {"micro_batch": 1},
    "tp2": {"tensor_parallel": 2, "micro_batch": 3},
    "dp2": {"data_parallel": 2, "micro_batch": 2},
    "pp2": {"pipeline_parallel": 2, "micro_batch": 2},
    "cp2": {"context_parallel": 2, "micro_batch": 3},
    "dp2_packed": {"data_parallel": 2, "micro_batch_tokens": 30},
}
COMPOSITIONS = {
    "ranked": [
        *("entropy.recipe=clip_cov", "entropy.options.share=0.1", "entropy.options.low=0.0"),
        *("objective.advantages=unlikeliness", "objective.whiten=true", "objective.aggregation=sequence_mean"),
        *("objective.mismatch=tis", "objective.mismatch_options.high=1.05", "objective.kl=0.1"),
    ],
    "penalised": [
        *("entropy.recipe=kl_cov", "entropy.options.share=0.1", "objective.advantages=rloo", "objective.clip_low=0.05"),
        *("objective.aggregation=constant", "objective.mismatch=mis_geometric", "objective.mismatch_options.low=0.9"),
    ],
    "nucleus": ["entropy.recipe=siren", "entropy.options.coefficient=0.5", "entropy.target=1.0"],
    "gated": [
        *("entropy.recipe=stare", "entropy.target=5.0", "entropy.options.both_signs=true"),
        *("entropy.signal=sequence", "objective.surrogate=cispo", "objective.kl=0.05", "objective.kl_estimator=k2"),
    ],
    "sequence": [
        *("entropy.recipe=par_pi", "objective.surrogate=gspo", "objective.clip_low=0.01", "objective.clip_high=0.01"),
        *("objective.surrogate_options.opsm=0.001", "objective.aggregation=sequence_mean"),
    ],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    folder: Path = tmp_path_factory.mktemp("composed")
    model = write_odd_model(folder / "odd")
    torch.save(random_batch(37), folder / "batch.pt")

    @functools.cache
    def of(layout: str) -> list[dict[str, Any]]:
        settings = LAYOUTS[layout]
        sizes = [size for name, size in settings.items() if name.endswith("_parallel")]
        policy = {"model": str(model), "learning_rate": LR, **settings, "megatron": {"adam_eps": 1e-3}}
        # a sequence's ratio needs the sequence whole, which context parallelism cuts
        chosen = {
            name: keys
            for name, keys in COMPOSITIONS.items()
            if name != "sequence" or "context_parallel" not in settings
        }
        found: list[dict[str, Any]] = run_ranks(
            "composed_jobs.steps",
            math.prod(sizes),
            policy=policy,
            batch_file=str(folder / "batch.pt"),
            compositions=chosen,
        )
        return found

    return of


CASES = [
    (layout, name)
    for layout in LAYOUTS
    for name in COMPOSITIONS
    if layout != "tp1" and (layout, name) != ("cp2", "sequence")
]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_a_composed_step_does_not_depend_on_the_layout(
    results: Callable[[str], list[dict[str, Any]]], layout: str, name: str
) -> None:
    wanted, got = results("tp1")[0][name], results(layout)[0][name]
    for mine, theirs in zip(got["steps"], wanted["steps"], strict=True):
        assert mine["signal"] == (None if theirs["signal"] is None else pytest.approx(theirs["signal"], rel=1e-5))
        torch.testing.assert_close(mine["advantages"], theirs["advantages"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine["weight"], theirs["weight"], rtol=1e-4, atol=1e-5)
        for key in (key for key in theirs if key.startswith("actuation/")):
            assert mine[key] == (None if theirs[key] is None else pytest.approx(theirs[key], rel=1e-4, abs=1e-6)), key
        assert mine["metrics"] == pytest.approx(theirs["metrics"], rel=2e-3, abs=2e-5)
    for tensor in wanted["weights"]:
        gap = (got["weights"][tensor] - wanted["weights"][tensor]).abs().max()
        assert float(gap) < 0.02 * LR, tensor


@pytest.mark.parametrize("layout", ["tp2", "dp2", "pp2", "cp2", "dp2_packed"])
def test_every_rank_decides_the_same_bits(results: Callable[[str], list[dict[str, Any]]], layout: str) -> None:
    first, *others = results(layout)
    for name in first:
        for other in others:
            assert other[name]["control"] == first[name]["control"]
            assert [step["metrics"] for step in other[name]["steps"]] == [
                step["metrics"] for step in first[name]["steps"]
            ]


def test_the_parts_do_something(results: Callable[[str], list[dict[str, Any]]]) -> None:
    """A layout test of parts that were off would pass."""
    found = {name: result["steps"][-1] for name, result in results("tp1")[0].items()}
    metrics = {name: step["metrics"] for name, step in found.items()}
    assert 0.0 < metrics["ranked"]["mismatch_high_fraction"] < 1.0
    assert metrics["ranked"]["kl_reference"] > 0.0
    assert int((found["ranked"]["weight"] == 0).sum()) > int((found["gated"]["weight"] == 0).sum())
    assert metrics["penalised"]["penalty"] > 0.0
    assert 0.0 < metrics["penalised"]["mismatch_dropped"] < 1.0
    assert metrics["nucleus"]["entropy_bonus"] != 0.0
    assert found["gated"]["actuation/gain"] == 0.1
    assert metrics["sequence"]["opsm_fraction"] > 0.0
    assert metrics["sequence"]["clip_fraction_high"] + metrics["sequence"]["clip_fraction_low"] > 0.0
