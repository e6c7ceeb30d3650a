"""``megatron-rlvr convert``: a checkpoint of any layout becomes the Hugging Face model that was saved in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_families import write_model
from policy_ranks import run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rlvr.cli import main
from megatron_rlvr.config import Config, DataConfig, PolicyConfig, RunConfig
from megatron_rlvr.training.run_directory import RunDirectory

# Run -> model and layout. 37 rows of vocabulary are padded to 38 where two ranks share them.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp1": ("qwen3_tied", {"tensor_parallel": 1}),
    "tp2": ("llama3", {"tensor_parallel": 2}),
    "tp2_bf16": ("qwen2_tied", {"tensor_parallel": 2, "precision": "bf16"}),
    "pp2_vpp2": ("qwen2_tied", {"tensor_parallel": 1, "pipeline_parallel": 2, "virtual_pipeline": 2}),
    "tp2_pp2": ("qwen2", {"tensor_parallel": 2, "pipeline_parallel": 2}),
}


class Runs:
    """A run directory with a checkpoint after step 2 and one after step 3 for each layout."""

    def __init__(self, folder: Path) -> None:
        self.weights: dict[str, dict[str, torch.Tensor]] = {}
        self.directories: dict[str, RunDirectory] = {}
        for name, (case, layout) in RUNS.items():
            model = write_model(case, folder / case)
            (model / "tokenizer.json").write_text("{}")
            run = self.directories[name] = RunDirectory(folder / name)
            policy = PolicyConfig(model=str(model), **layout)
            run.open(Config(run=RunConfig(dir=str(run.path)), data=DataConfig(train="countdown"), policy=policy))
            ranks = layout["tensor_parallel"] * layout.get("pipeline_parallel", 1)
            arguments = {"model": str(model), "layout": layout, "directory": str(run.start_checkpoint(3))}
            self.weights[name] = run_ranks("hf_jobs.checkpoint", ranks, **arguments)[0]
            run.commit_checkpoint(3, kept=2)
            run.start_checkpoint(2)
            run.commit_checkpoint(2, kept=2)  # an older one, and empty
        self.outputs = {name: folder / f"{name}_converted" for name in RUNS}
        pairs = {name: [str(self.directories[name].path), str(self.outputs[name])] for name in RUNS}
        assert run_ranks("hf_jobs.convert", 1, runs=pairs) == [[0] * len(RUNS)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", RUNS)
def test_the_newest_checkpoint_of_any_layout_bit_for_bit(runs: Runs, name: str) -> None:
    converted = load_file(runs.outputs[name] / "model.safetensors")
    saved = runs.weights[name]
    assert converted.keys() == saved.keys()
    for tensor, value in saved.items():
        assert converted[tensor].dtype == value.dtype
        assert torch.equal(converted[tensor], value)
    original = load_file(runs.directories[name].path.parent / RUNS[name][0] / "model.safetensors")
    assert not torch.equal(original["model.norm.weight"], converted["model.norm.weight"].float())


@pytest.mark.parametrize(("name", "dtype"), [("tp2", "float32"), ("tp2_bf16", "bfloat16")])
def test_transformers_reads_the_dtype_that_was_trained(runs: Runs, name: str, dtype: str) -> None:
    output = runs.outputs[name]
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype
    assert {parameter.dtype for parameter in AutoModelForCausalLM.from_pretrained(output).parameters()} == {
        getattr(torch, dtype)
    }
    assert (output / "tokenizer.json").exists()


def test_the_command_in_a_process_of_its_own(runs: Runs, tmp_path: Path) -> None:
    checkpoint = runs.directories["tp2"].checkpoint(3)
    command = [sys.executable, "-m", "megatron_rlvr", "convert", str(checkpoint), str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", runs.outputs["tp2"]))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_what_cannot_be_converted(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.directories["tp1"]
    (tmp_path / "empty").mkdir()
    for source, output, sentence in (
        (tmp_path / "empty", tmp_path / "out", "holds no checkpoint of a run; give the run.dir of a run"),
        (run.checkpoint(7), tmp_path / "out", "step_7 holds no checkpoint of a run"),
        (run.path, runs.outputs["tp1"], "tp1_converted is not an empty directory; convert into a new one"),
    ):
        assert main(["convert", str(source), str(output)]) == 2
        assert sentence in capsys.readouterr().err
    victim = next((run.checkpoint(3) / "policy").glob("*.distcp"))
    content = victim.read_bytes()
    victim.write_bytes(content[:-1])
    assert main(["convert", str(run.path), str(tmp_path / "out")]) == 2
    victim.write_bytes(content)
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
