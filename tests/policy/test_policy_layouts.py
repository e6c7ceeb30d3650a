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
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "dp2": (1, 2), "tp2_dp2": (2, 2)}
MICRO_BATCHES = [1, 3, 8]
CASES = [("base", "tp1"), ("base", "tp2"), ("base", "dp2"), *(("odd", name) for name in LAYOUTS)]
STEPS = [(*case, size) for case in CASES for size in MICRO_BATCHES]

Batch = dict[str, torch.Tensor]


class Runs:
    """The runs of one version of Megatron-Core, each started when first asked for."""

    def __init__(self, megatron_core: str | None, folder: Path) -> None:
        self._nursery = nursery(megatron_core)
        self.folder = folder
        self.models = {"base": BASE, "odd": write_odd_model(folder / "odd")}
        self.batches = {"base": sampled_batch(BASE), "odd": random_batch(37)}
        self.of = functools.cache(self._of)
        self.exact_stats = functools.cache(self._exact_stats)

    def _of(self, model: str, layout: str) -> list[Any]:
        torch.save(self.batches[model], self.folder / f"{model}.pt")
        tp, dp = LAYOUTS[layout]
        policy = {
            "model": str(self.models[model]),
            "tensor_parallel": tp,
            "data_parallel": dp,
            "learning_rate": LR,
            "megatron": {"clip_grad": 0.5, "adam_eps": ADAM_EPSILON},
        }
        return self._nursery.run(
            "layout",
            tp * dp,
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
            assert (step["mean_entropy"], step["positive_weight"]) == (other["mean_entropy"], other["positive_weight"])
            assert all(torch.equal(other["weights"][name], step["weights"][name]) for name in step["weights"])


@pytest.mark.parametrize(("model", "layout", "micro_batch"), STEPS)
def test_log_probs_and_entropies_are_those_of_float64(runs: Runs, model: str, layout: str, micro_batch: int) -> None:
    step = runs.step(model, layout, micro_batch)
    logprob_BL, entropy_BL = runs.exact_stats(model)
    torch.testing.assert_close(step["logprobs"].double(), logprob_BL, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(step["entropy"].double(), entropy_BL, rtol=0.0, atol=1e-5)
    counted_BL = runs.batches[model]["response_mask_BL"] & runs.batches[model]["valid_B"][:, None]
    assert step["mean_entropy"] == pytest.approx(float(entropy_BL[counted_BL].mean()), rel=1e-6)


@pytest.mark.parametrize(("model", "layout", "micro_batch"), STEPS)
def test_a_step_does_not_depend_on_the_layout(runs: Runs, model: str, layout: str, micro_batch: int) -> None:
    reference, step = runs.step(model, "tp1", 8), runs.step(model, layout, micro_batch)
    assert step["mean_entropy"] == pytest.approx(reference["mean_entropy"], rel=1e-6)
    assert step["positive_weight"] == reference["positive_weight"]
    assert step["learning_rate"] == reference["learning_rate"]
    assert len(step["updates"]) == 3
    for update, wanted in zip(step["updates"], reference["updates"], strict=True):
        assert update == pytest.approx(wanted, rel=1e-5, abs=1e-7)
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
