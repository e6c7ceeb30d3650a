"""bf16 on a machine without CUDA: as close to float64 as transformers, finite, and stored as bf16."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_models import BASE, exact_model, exact_stats, sampled_batch, write_odd_model
from policy_ranks import run_ranks
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_parallel": 2},
    "tp2_sp": {"tensor_parallel": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel": 2, "megatron": {"num_layers_in_first_pipeline_stage": 1}},
    "cp2_packed": {"context_parallel": 2, "micro_batch_tokens": 20},
    "dp2_distopt": {"data_parallel": 2, "megatron": {"use_distributed_optimizer": True}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_trains(tmp_path: Path, layout: str) -> None:
    batch = sampled_batch(BASE)
    torch.save(batch, tmp_path / "batch.pt")
    policy = {"model": str(BASE), "precision": "bf16", "learning_rate": 1e-3, "megatron": {}, **LAYOUTS[layout]}
    ranks = 1 if layout == "tp1" else 2
    result = run_ranks(
        "layout", ranks, policy=policy, batch_file=str(tmp_path / "batch.pt"), micro_batches=[8], export=None
    )[0]["steps"][8]
    mask_BL = batch["response_mask_BL"]
    with torch.no_grad():
        truth = exact_stats(exact_model(BASE), batch)
        peer = exact_stats(Qwen3ForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16), batch)
    for name, exact_BL, peer_BL in zip(("logprobs", "entropy"), truth, peer, strict=True):
        assert result[name].dtype == torch.float32
        error_T, peer_error_T = ((stat_BL - exact_BL)[mask_BL].abs() for stat_BL in (result[name], peer_BL))
        assert error_T.mean() < 0.01
        assert error_T.max() < 2 * peer_error_T.max()  # transformers in bf16 is as far off: 0.06 at the worst token
    assert {weight.dtype for weight in result["weights"].values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in result["weights"].values())
    assert all(math.isfinite(value) for update in result["updates"] for value in update.values())
    assert any(not torch.equal(result["weights"][name], result["loaded"][name]) for name in result["weights"])


def test_export_names_the_dtype_it_holds(tmp_path: Path) -> None:
    """Weights of a bf16 file that were trained in fp32 have to come back as fp32, whatever config.json said before."""
    model = write_odd_model(tmp_path / "odd", dtype=torch.bfloat16)
    torch.save(sampled_batch(BASE), tmp_path / "batch.pt")
    policy = {"model": str(model), "tensor_parallel": 1, "learning_rate": 1e-3, "megatron": {}}
    export = tmp_path / "export"
    (result,) = run_ranks(
        "layout", 1, policy=policy, batch_file=str(tmp_path / "batch.pt"), micro_batches=[8], export=str(export)
    )
    file, weights = load_file(model / "model.safetensors"), result["steps"][8]["weights"]
    assert all(torch.equal(file[name].float(), loaded) for name, loaded in result["steps"][8]["loaded"].items())
    exported = dict(Qwen3ForCausalLM.from_pretrained(export).named_parameters())
    assert {parameter.dtype for parameter in exported.values()} == {torch.float32}
    assert all(torch.equal(exported[name], weights[name]) for name in weights)
