"""The CPU runtime: which versions it takes, and how little of torch it touches."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import pytest
import torch
from policy_ranks import run_ranks

from megatron_rlvr.core import RLVRError
from megatron_rlvr.policy import cpu_runtime


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process, whatever ran before."""
    monkeypatch.setattr(cpu_runtime, "_installed", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("not_installed")
def test_an_untested_version_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.17.0")
    with pytest.raises(RLVRError) as refusal:
        cpu_runtime.install()
    assert str(refusal.value) == (
        "megatron-core 0.17.0 was not tested without CUDA; install one of 0.16.1, 0.19.2 "
        "(pip install megatron-core==VERSION) or run on a machine with CUDA"
    )


@pytest.mark.usefixtures("not_installed")
def test_a_missing_megatron_core_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(RLVRError, match="pip install megatron-core"):
        cpu_runtime.install()


def test_it_does_nothing_where_cuda_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99.0")
    modules = set(sys.modules)
    tensor_cuda = torch.Tensor.cuda
    cpu_runtime.install()
    assert set(sys.modules) == modules
    assert torch.Tensor.cuda is tensor_cuda


@pytest.fixture(scope="module")
def installed() -> dict[str, Any]:
    (report,) = run_ranks("runtime", 1)
    assert isinstance(report, dict)
    return report


def test_of_torch_itself_only_tensor_cuda_is_replaced(installed: dict[str, Any]) -> None:
    assert installed["patched"] == {"Tensor.cuda"}


def test_megatron_core_computes_on_the_cpu_and_fails_loudly_at_the_rest(installed: dict[str, Any]) -> None:
    assert installed["device"] == "cpu"
    assert installed["unknown"]


def test_a_second_install_changes_nothing(installed: dict[str, Any]) -> None:
    assert installed["changed_by_second_install"] == []


def test_no_stand_in_for_triton_is_left_behind(installed: dict[str, Any]) -> None:
    assert installed["triton"] == []
