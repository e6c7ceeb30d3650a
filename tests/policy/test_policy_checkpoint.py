"""The policy's checkpoint: what a new set of processes loads continues bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_models import random_batch, write_odd_model
from policy_ranks import run_ranks

OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "pp2_uneven": {"pipeline_parallel": 2, "megatron": {"num_layers_in_first_pipeline_stage": 1}},
    "pp2_vpp2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "cp2": {"context_parallel": 2},
    "dp2": {"data_parallel": 2},
    "dp2_distopt": {"data_parallel": 2, "megatron": OVERLAP},
    "tp1_distopt": {"megatron": OVERLAP},
    "tp2_distopt": {"tensor_parallel": 2, "megatron": OVERLAP},
    "pp2_distopt": {"pipeline_parallel": 2, "megatron": OVERLAP},
}
SAME = ("tp1", "tp2", "pp2", "pp2_vpp2", "dp2_distopt")
RESHARDED = (
    *(("tp2", "tp1"), ("tp2", "pp2"), ("tp2", "pp2_vpp2"), ("tp2", "dp2"), ("tp1", "tp2"), ("tp1", "cp2")),
    *(("pp2", "tp2"), ("pp2_vpp2", "tp1"), ("pp2", "pp2_uneven")),
    *(("dp2_distopt", "tp1_distopt"), ("dp2_distopt", "tp2_distopt"), ("tp2_distopt", "dp2_distopt")),
    *(("tp1_distopt", "pp2_distopt"), ("pp2_distopt", "dp2_distopt")),
)
_RANKS = ("tensor_parallel", "data_parallel", "pipeline_parallel", "context_parallel")


class Checkpoints:
    """A saved checkpoint per layout, made when first asked for, with what the processes that saved it did next."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self._folder = folder
        self._model = write_odd_model(folder / "odd", num_hidden_layers=4, **changes)
        torch.save(random_batch(37), folder / "batch.pt")
        self._saved: dict[str, list[Any]] = {}

    def saved(self, name: str) -> list[Any]:
        if name not in self._saved:
            (self._folder / name).mkdir()
            self._saved[name] = self._run("save_checkpoint", name, name)
        return self._saved[name]

    def load(self, name: str, layout: str) -> list[Any]:
        self.saved(name)
        return self._run("load_checkpoint", name, layout)

    def save_late(self, name: str, layout: str) -> list[Any]:
        (self._folder / name).mkdir()
        self._saved[name] = self._run("save_checkpoint", name, layout, late=True)
        return self._saved[name]

    def _run(self, job: str, name: str, layout: str, **more: Any) -> list[Any]:
        settings = LAYOUTS[layout]
        policy = {"model": str(self._model), "learning_rate": 1e-3, "micro_batch": 4, **settings}
        ranks = math.prod(settings.get(name, 1) for name in _RANKS)
        batch_file, directory = str(self._folder / "batch.pt"), str(self._folder / name)
        return run_ranks(job, ranks, policy=policy, batch_file=batch_file, directory=directory, **more)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def tied_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


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


@pytest.mark.parametrize("layout", SAME)
def test_new_processes_continue_bit_for_bit(checkpoints: Checkpoints, layout: str) -> None:
    for before, after in zip(checkpoints.saved(layout), checkpoints.load(layout, layout), strict=True):
        assert unequal(before["saved"], after["saved"]) == []
        assert unequal(before["next"], after["next"]) == []
        assert after["changed"] is None


@pytest.mark.parametrize("layout", ["tp2", "dp2_distopt"])
def test_a_checkpoint_written_later_holds_the_state_it_was_asked_for(checkpoints: Checkpoints, layout: str) -> None:
    name = f"{layout}_late"
    for before, after in zip(checkpoints.save_late(name, layout), checkpoints.load(name, layout), strict=True):
        assert unequal(before["saved"], after["saved"]) == []
        assert unequal(before["next"], after["next"]) == []


@pytest.mark.parametrize("layout", SAME)
def test_the_comparison_is_worth_something(checkpoints: Checkpoints, layout: str) -> None:
    for rank in checkpoints.saved(layout):
        loaded, saved, after = rank["loaded"], rank["saved"], rank["next"]
        assert unequal(loaded, saved["weights"])
        for part in ("weights", "optimizer", "schedule", "learning_rate", "rng"):
            assert unequal(saved[part], after[part]), part
        assert any("exp_avg_sq" in place for place in unequal(saved["optimizer"], after["optimizer"]))


def assert_continues(before: dict[str, Any], after: dict[str, Any]) -> None:
    """The same weights and schedule, and the same update after them, which depends on all of the optimizer's state."""
    for part in ("weights", "schedule", "learning_rate"):
        assert unequal(before["saved"][part], after["saved"][part]) == [], part
    for name, weight in before["next"]["weights"].items():
        # a step is of the size of the learning rate, 1e-3
        torch.testing.assert_close(after["next"]["weights"][name], weight, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(("saved", "layout"), RESHARDED)
def test_another_layout_continues_and_says_so(checkpoints: Checkpoints, saved: str, layout: str) -> None:
    before = checkpoints.saved(saved)[0]
    for after in checkpoints.load(saved, layout):
        assert_continues(before, after)
        assert after["changed"].startswith("policy.")
        assert "up to rounding instead of bit for bit" in after["changed"]


def test_what_has_changed_is_named(checkpoints: Checkpoints) -> None:
    for after in checkpoints.load("tp2", "dp2"):
        assert after["changed"].startswith(
            "policy.tensor_parallel=2 became 1, policy.data_parallel=1 became 2: weights, optimizer and schedule"
        )


@pytest.mark.parametrize(("saved", "layout"), [("tp2", "pp2"), ("pp2", "tp1")])
def test_tied_embeddings_in_another_layout(tied_checkpoints: Checkpoints, saved: str, layout: str) -> None:
    before = tied_checkpoints.saved(saved)[0]
    for after in tied_checkpoints.load(saved, layout):
        assert_continues(before, after)


@pytest.mark.parametrize(("saved", "layout", "said"), [("tp2", "dp2_distopt", "false"), ("dp2_distopt", "tp2", "true")])
def test_every_rank_refuses_the_other_kind_of_optimizer(
    checkpoints: Checkpoints, saved: str, layout: str, said: str
) -> None:
    for result in checkpoints.load(saved, layout):
        assert f"was saved with policy.megatron.use_distributed_optimizer={said}" in result["error"]
