"""What can be checked without a GPU: which tensors move, that a step is the same, and whose apex it is."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rlvr.policy.gpu_memory import gradient_accumulation_fusion, move_optimizer_state


def trained(moves: bool) -> tuple[torch.nn.Parameter, Any]:
    """Adam over three steps, its state moved to another dtype-preserving copy and back between them."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3))
    adam = torch.optim.Adam([weight], lr=0.1)
    chained = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam)])
    for _ in range(3):
        weight.grad = torch.randn(4, 3)
        adam.step()
        if moves:
            assert move_optimizer_state(chained, torch.device("cpu")) == 2 * 4 * 3 * 4
    return weight, adam


def test_every_state_tensor_moves_and_the_step_counter_stays() -> None:
    _, adam = trained(moves=False)
    assert move_optimizer_state(SimpleNamespace(optimizer=adam), torch.device("meta")) == 2 * 4 * 3 * 4
    (state,) = adam.state.values()
    assert {name: value.device.type for name, value in state.items()} == {
        "step": "cpu",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }


def test_moving_changes_no_bit() -> None:
    assert torch.equal(trained(moves=True)[0], trained(moves=False)[0])


@pytest.mark.parametrize("nvidias", [True, False])
def test_somebody_elses_apex_is_warned_about(
    nvidias: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    present = {"apex", "amp_C"} if nvidias else {"apex"}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: importlib.machinery.ModuleSpec(name, None) if name in present else None,
    )
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(_grad_accum_fusion_available=nvidias))
    assert gradient_accumulation_fusion() is nvidias
    assert [str(warning.message).partition(";")[0] for warning in recwarn] == (
        [] if nvidias else ["the installed package apex is not NVIDIA's (its module amp_C is missing)"]
    )
