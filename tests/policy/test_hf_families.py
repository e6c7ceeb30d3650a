"""Every supported family in every layout: transformers' log-probs, and weights that survive an export bit for bit."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_families import CASES, config_of, random_tokens, transformers_log_probs, write_model
from policy_ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rlvr.policy.architecture import Architecture

TEMPERATURE = 0.8
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"tensor_parallel": 1, "pipeline_parallel": 1},
    "tp2": {"tensor_parallel": 2, "pipeline_parallel": 1},
    "pp2": {"tensor_parallel": 1, "pipeline_parallel": 2},
    "pp2_vpp2": {"tensor_parallel": 1, "pipeline_parallel": 2, "virtual_pipeline": 2},
    "tp2_pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
}


class Families:
    """All cases in one layout at a time, each layout run when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.models = {case: write_model(case, folder / case) for case in CASES}
        self.batch = random_tokens(37)
        torch.save(self.batch, folder / "batch.pt")
        self.of = functools.cache(self._of)

    def _of(self, layout: str) -> list[Any]:
        return run_ranks(
            "hf_jobs.families",
            LAYOUTS[layout]["tensor_parallel"] * LAYOUTS[layout]["pipeline_parallel"],
            models={case: str(path) for case, path in self.models.items()},
            batch_file=str(self._folder / "batch.pt"),
            layout=LAYOUTS[layout],
            export=str(self._folder / layout),
            temperature=TEMPERATURE,
        )

    def export(self, layout: str, case: str) -> Path:
        self.of(layout)
        return self._folder / layout / case


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"))


every_case = pytest.mark.parametrize("case", CASES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@every_layout
@every_case
def test_log_probs_are_those_of_transformers(families: Families, case: str, layout: str) -> None:
    exact_BL = transformers_log_probs(families.models[case], families.batch, torch.float64, TEMPERATURE)
    assert exact_BL.std() > 0.5  # the model says something
    for rank in families.of(layout):
        torch.testing.assert_close(rank[case]["logprobs"].double(), exact_BL, rtol=0.0, atol=2e-5)


@every_layout
@every_case
def test_weights_are_those_of_the_file_and_of_the_export_loaded_again(
    families: Families, case: str, layout: str
) -> None:
    file = load_file(families.models[case] / "model.safetensors")
    for rank in families.of(layout):
        for weights in (rank[case]["weights"], rank[case]["again"]):
            assert weights.keys() == file.keys()
            assert all(torch.equal(weights[name], file[name]) for name in file)


@every_layout
@every_case
def test_an_export_in_shards_is_what_transformers_reads(families: Families, case: str, layout: str) -> None:
    export = families.export(layout, case)
    index = json.loads((export / "model.safetensors.index.json").read_text())
    files = sorted(export.glob("*.safetensors"))
    assert len(files) > 2
    assert {path.name for path in files} == set(index["weight_map"].values())
    held = 0
    for path in files:
        with safe_open(path, "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118  # no mapping
        assert len(sizes) == 1 or sum(sizes) <= 30_000
        held += sum(sizes)
    assert held == index["metadata"]["total_size"]
    assert not (export / "unfinished").exists()
    original = dict(AutoModelForCausalLM.from_pretrained(families.models[case]).named_parameters())
    exported = dict(AutoModelForCausalLM.from_pretrained(export).named_parameters())
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


@every_case
def test_rope_frequencies_are_transformers_bits(families: Families, case: str) -> None:
    config = AutoConfig.from_pretrained(families.models[case])
    theta, head_dim = config.rope_parameters["rope_theta"], getattr(config, "head_dim", None) or 8
    if (kind := config.rope_parameters["rope_type"]) == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        expected = 1.0 / theta**exponent
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        assert scale == 1.0
    hf = json.loads((families.models[case] / "config.json").read_text())
    assert torch.equal(Architecture.of(hf).rope_frequencies(), expected)


def test_llama3_frequencies_are_kept_blended_and_divided() -> None:
    """Or the comparison of frequencies would not see one of the three."""
    for head_dim in (8, 12):
        hf = config_of("llama3") | {"head_dim": head_dim}
        scaled = Architecture.of(hf).rope_frequencies()
        plain = Architecture.of(hf | {"rope_parameters": {"rope_theta": 300.5}}).rope_frequencies()
        ratio = scaled / plain
        assert (ratio == 1).any()
        assert torch.isclose(ratio, torch.tensor(1 / 8)).any()
        assert ((ratio < 0.99) & (ratio > 0.13)).any()


def test_both_spellings_of_rope_mean_the_same() -> None:
    new = config_of("llama3")
    scaling = {key: value for key, value in new["rope_parameters"].items() if key != "rope_theta"}
    old = {**new, "rope_theta": 300.5, "rope_scaling": scaling}
    del old["rope_parameters"]
    assert Architecture.of(old) == Architecture.of(new)
