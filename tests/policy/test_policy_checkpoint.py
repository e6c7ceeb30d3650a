"""The policy's checkpoint: what a new set of processes loads continues bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from policy_models import random_batch, write_odd_model
from policy_ranks import run_ranks

LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1)}


class Checkpoints:
    """One saved checkpoint per layout, with what the processes that saved it did next."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = write_odd_model(folder / "odd")
        torch.save(random_batch(37), folder / "batch.pt")
        for name in LAYOUTS:
            (folder / name).mkdir()
        self.saved = {name: self._run("save_checkpoint", name, name) for name in LAYOUTS}

    def load(self, name: str, layout: str) -> list[Any]:
        return self._run("load_checkpoint", name, layout)

    def _run(self, job: str, name: str, layout: str) -> list[Any]:
        tp, dp = LAYOUTS[layout]
        policy = {
            "model": str(self._model),
            "tensor_parallel": tp,
            "data_parallel": dp,
            "learning_rate": 1e-3,
            "micro_batch": 8,
        }
        batch_file, directory = str(self._folder / "batch.pt"), str(self._folder / name)
        return run_ranks(job, tp * dp, policy=policy, batch_file=batch_file, directory=directory)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


def unequal(a: Any, b: Any, where: str = "") -> list[str]:
    """Places where two nested structures do not hold the same bits."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: {a.keys() ^ b.keys()}"]
        return [place for key in a for place in unequal(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [where]
        return [place for i, (x, y) in enumerate(zip(a, b, strict=True)) for place in unequal(x, y, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {a} != {b}"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_processes_continue_bit_for_bit(checkpoints: Checkpoints, layout: str) -> None:
    for before, after in zip(checkpoints.saved[layout], checkpoints.load(layout, layout), strict=True):
        assert unequal(before["saved"], after["saved"]) == []
        assert unequal(before["next"], after["next"]) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_comparison_is_worth_something(checkpoints: Checkpoints, layout: str) -> None:
    for rank in checkpoints.saved[layout]:
        loaded, saved, after = rank["loaded"], rank["saved"], rank["next"]
        assert unequal(loaded, saved["weights"])
        for part in ("weights", "optimizer", "schedule", "learning_rate", "rng"):
            assert unequal(saved[part], after[part]), part
        assert any("exp_avg_sq" in place for place in unequal(saved["optimizer"], after["optimizer"]))


@pytest.mark.parametrize(("saved", "layout"), [("tp1", "tp2"), ("tp2", "tp1")])
def test_every_rank_refuses_a_checkpoint_of_another_number_of_ranks(
    checkpoints: Checkpoints, saved: str, layout: str
) -> None:
    ranks = {"tp1": 1, "tp2": 2}
    for result in checkpoints.load(saved, layout):
        assert f"was saved by {ranks[saved]} rank(s) and cannot be resumed by {ranks[layout]}" in result["error"]
        assert "policy.tensor_parallel" in result["error"]
