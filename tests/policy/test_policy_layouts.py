"""One training step in every layout, on real gloo ranks: the same numbers, and those of a float64 oracle."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_models import (
    BASE,
    exact_loss,
    exact_model,
    exact_stats,
    random_batch,
    sampled_batch,
    write_odd_model,
)
from policy_ranks import nursery
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

LR = 1e-3
# Adam divides by |g| + epsilon: with the usual 1e-8 it would turn the rounding of gradients near 0 into whole steps.
ADAM_EPSILON = 1e-3
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_parallel": 2},
    "dp2": {"data_parallel": 2},
    "tp2_dp2": {"tensor_parallel": 2, "data_parallel": 2},
    "tp2_sp": {"tensor_parallel": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel": 2},
    "pp2_uneven": {"pipeline_parallel": 2, "megatron": {"num_layers_in_first_pipeline_stage": 1}},
    "pp2_vpp2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "cp2": {"context_parallel": 2},
    "dp2_distopt": {"data_parallel": 2, "megatron": OVERLAP},
    "tp2_sp_pp2_distopt": {
        **{"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2},
        "megatron": {**OVERLAP, "recompute_granularity": "full", "recompute_method": "uniform"}
        | {"recompute_num_layers": 1},
    },
    "tp2_sp_cp2_packed": {
        **{"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2},
        "micro_batch_tokens": 40,
    },
    "packed": {"micro_batch_tokens": 20},
    "dp2_packed": {"data_parallel": 2, "micro_batch_tokens": 20},
}
MICRO_BATCHES = [1, 3, 8]
CASES = [
    *(("base", name) for name in ("tp1", "tp2", "dp2", "tp2_sp", "pp2_uneven", "cp2", "packed")),
    *(("odd", name) for name in ("tp1", "tp2", "dp2", "tp2_dp2", "tp2_sp", "pp2", "cp2", "dp2_distopt", "dp2_packed")),
    *(("deep", name) for name in ("tp1", "pp2_vpp2", "tp2_sp_pp2_distopt", "tp2_sp_cp2_packed")),
]
STEPS = [(*case, size) for case in CASES for size in MICRO_BATCHES]

_RANKS = ("tensor_parallel", "data_parallel", "pipeline_parallel", "context_parallel")

Batch = dict[str, torch.Tensor]


class Runs:
    """The runs of one version of Megatron-Core, each started when first asked for."""

    def __init__(self, megatron_core: str | None, folder: Path) -> None:
        self._nursery = nursery(megatron_core)
        self.folder = folder
        deep = write_odd_model(folder / "deep", num_hidden_layers=4, tie_word_embeddings=True)
        self.models = {"base": BASE, "odd": write_odd_model(folder / "odd"), "deep": deep}
        self.batches = {"base": sampled_batch(BASE), "odd": random_batch(37), "deep": random_batch(37)}
        self.of = functools.cache(self._of)
        self.exact_stats = functools.cache(self._exact_stats)

    def _of(self, model: str, layout: str) -> list[Any]:
        torch.save(self.batches[model], self.folder / f"{model}.pt")
        settings = LAYOUTS[layout]
        policy = {
            "model": str(self.models[model]),
            "learning_rate": LR,
            **settings,
            "megatron": {"clip_grad": 0.5, "adam_eps": ADAM_EPSILON, **settings.get("megatron", {})},
        }
        return self._nursery.run(
            "layout",
            math.prod(size for name, size in settings.items() if name in _RANKS),
            policy=policy,
            batch_file=str(self.folder / f"{model}.pt"),
            micro_batches=MICRO_BATCHES,
            export=str(self.export(model, layout)),
        )

    def _exact_stats(self, model: str) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return exact_stats(exact_model(self.models[model]), self.batches[model])

    def export(self, model: str, layout: str) -> Path:
        return self.folder / f"export_{model}_{layout}"

    def step(self, model: str, layout: str, micro_batch: int) -> dict[str, Any]:
        step: dict[str, Any] = self.of(model, layout)[0]["steps"][micro_batch]
        return step


@pytest.fixture(scope="module", params=["installed", "other"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    other = os.environ.get("MEGATRON_CORE_OTHER")
    if request.param == "other" and other is None:
        pytest.skip("MEGATRON_CORE_OTHER names no folder with another Megatron-Core")
    if other is not None:
        nursery(other)  # starts while the installed version is tested
    runs = Runs(other if request.param == "other" else None, tmp_path_factory.mktemp("layouts"))
    used = runs.of("odd", "tp1")[0]["version"]
    assert (used == importlib.metadata.version("megatron-core")) == (request.param == "installed")
    return runs


def worst(got: Batch, wanted: Batch) -> float:
    """Largest difference of any element of any tensor."""
    assert got.keys() == wanted.keys()
    return max(float((got[name].double() - wanted[name].double()).abs().max()) for name in wanted)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_loads_the_file_bit_for_bit(runs: Runs, model: str, layout: str) -> None:
    file = load_file(runs.models[model] / "model.safetensors")
    loaded = runs.step(model, layout, 8)["loaded"]
    assert loaded.keys() == file.keys()
    assert all(torch.equal(loaded[name], file[name]) for name in file)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_every_rank_holds_the_same_bits(runs: Runs, model: str, layout: str) -> None:
    first, *others = runs.of(model, layout)
    for size in MICRO_BATCHES:
        step = first["steps"][size]
        for other in (rank["steps"][size] for rank in others):
            assert torch.equal(step["logprobs"], other["logprobs"])
            assert torch.equal(step["entropy"], other["entropy"])
            assert torch.equal(step["nucleus"], other["nucleus"])
            assert torch.equal(step["reference"], other["reference"])
            assert step["updates"] == other["updates"]
            assert all(torch.equal(other["weights"][name], step["weights"][name]) for name in step["weights"])


@pytest.mark.parametrize(("model", "layout", "micro_batch"), STEPS)
def test_log_probs_and_entropies_are_those_of_float64(runs: Runs, model: str, layout: str, micro_batch: int) -> None:
    step = runs.step(model, layout, micro_batch)
    logprob_BL, entropy_BL = runs.exact_stats(model)
    torch.testing.assert_close(step["logprobs"].double(), logprob_BL, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(step["entropy"].double(), entropy_BL, rtol=0.0, atol=1e-5)
    # after the updates, too
    torch.testing.assert_close(step["reference"].double(), logprob_BL, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(("model", "layout", "micro_batch"), STEPS)
def test_a_step_does_not_depend_on_the_layout(runs: Runs, model: str, layout: str, micro_batch: int) -> None:
    reference, step = runs.step(model, "tp1", 8), runs.step(model, layout, micro_batch)
    torch.testing.assert_close(step["nucleus"], reference["nucleus"], rtol=0.0, atol=1e-5)
    assert step["learning_rate"] == reference["learning_rate"]
    assert len(step["updates"]) == 3
    for update, wanted in zip(step["updates"], reference["updates"], strict=True):
        assert update == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert wanted["grad_norm"] > 0.5  # so the clipping of gradients takes part
    moved = worst(reference["weights"], reference["loaded"])
    assert 2 * LR < moved < 4 * LR
    assert worst(step["weights"], reference["weights"]) < 1e-3 * LR


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_loss_and_gradient_are_those_of_float64(runs: Runs, model: str, layout: str) -> None:
    result = runs.of(model, layout)[0]["gradient"]
    oracle = exact_model(runs.models[model])
    loss = exact_loss(oracle, runs.batches[model], result["old_logprobs"].double())
    torch.autograd.backward(loss)
    exact = {name: parameter.grad for name, parameter in oracle.named_parameters() if parameter.grad is not None}
    assert result["grads"].keys() == exact.keys()
    for name, grad in exact.items():
        error = (result["grads"][name].double() - grad).abs().max() / grad.abs().max()
        assert error < 1e-5, name
    metrics = result["metrics"]
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in exact.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["clip_fraction_high"] > 0.05
    assert metrics["clip_fraction_low"] > 0.05


def test_the_model_hands_over_hidden_states_and_no_logits(runs: Runs) -> None:
    width = exact_model(runs.models["odd"]).config.hidden_size
    assert width not in (37, 37 // 2)  # the vocabulary of that model and a shard of it
    for rank in runs.of("odd", "tp2"):
        assert rank["gradient"]["output_widths"] == {width}


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_the_first_update_is_adams(runs: Runs, model: str, layout: str) -> None:
    result = runs.of(model, layout)[0]["gradient"]
    for name, before in load_file(runs.models[model] / "model.safetensors").items():
        grad = result["grads"][name]
        decay = 0.01 if before.ndim > 1 else 0.0  # Megatron-Core's default; norms are exempt
        expected = before * (1 - LR * decay) - LR * grad / (grad.abs() + ADAM_EPSILON)
        torch.testing.assert_close(result["weights"][name], expected, rtol=0.0, atol=1e-3 * LR)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_export_is_the_policy_bit_for_bit(runs: Runs, model: str, layout: str) -> None:
    weights = runs.step(model, layout, MICRO_BATCHES[-1])["weights"]
    exported = Qwen3ForCausalLM.from_pretrained(runs.export(model, layout))
    assert dict(exported.named_parameters()).keys() == weights.keys()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in exported.named_parameters())
    tokenizer_files = {path.name for path in runs.models[model].glob("*token*")}
    assert tokenizer_files <= {path.name for path in runs.export(model, layout).iterdir()}


def test_the_cosine_schedule_moves_once_per_step(runs: Runs) -> None:
    assert runs.step("odd", "tp1", 8)["learning_rate"] == pytest.approx(LR * (1 + math.cos(math.pi / 10)) / 2)


def test_the_batch_is_worth_testing(runs: Runs) -> None:
    for batch in runs.batches.values():
        mask_BL = batch["response_mask_BL"]
        assert len(set(mask_BL.sum(1).tolist())) > 3
        assert (~batch["valid_B"]).sum() == 2
        assert len({tuple(rewards) for rewards in batch["rewards_B"].reshape(6, 4).tolist()}) > 2
