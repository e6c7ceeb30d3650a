"""Settings and models that cannot be trained are refused in one sentence that names them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_models import BASE, sampled_batch
from policy_ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_rlvr.core import RLVRError
from megatron_rlvr.policy import parallel

MEGATRON = {
    "unknown": ("adam_bata2", 0.9, "policy.megatron.adam_bata2 is no key of Megatron-Core's; did you mean adam_beta2?"),
    "lr": ("lr", 1.0, "policy.megatron.lr is decided by policy.learning_rate"),
    "precision": ("bf16", True, "policy.megatron.bf16 is decided by policy.precision"),
    "tensor": ("tensor_model_parallel_size", 2, "is decided by policy.tensor_parallel"),
    "token_mean": ("calculate_per_token_loss", False, "is decided by the objective"),
    "optimizer": ("optimizer", "sgd", "policy.megatron.optimizer is decided by policy.learning_rate"),
    "dropout": ("hidden_dropout", 0.1, "policy.megatron.hidden_dropout is decided by the objective"),
    "architecture": ("num_layers", 2, "policy.megatron.num_layers is decided by the model's config.json"),
    "pipeline": ("pipeline_model_parallel_size", 2, "pipeline_model_parallel_size is decided by policy.pipeline_par"),
    "sequence": ("sequence_parallel", True, "policy.megatron.sequence_parallel is decided by policy.sequence_parallel"),
    "context": ("context_parallel_size", 2, "is decided by policy.context_parallel"),
    "lengths": ("variable_seq_lengths", False, "is decided by the micro-batches"),
    "gather": ("overlap_param_gather", True, "set policy.megatron.use_distributed_optimizer=true, too"),
    "expert": ("expert_model_parallel_size", 2, "policy.megatron.expert_model_parallel_size is not supported yet"),
}


def changed_base(directory: Path, **changes: Any) -> Path:
    """The base model with another config.json."""
    shutil.copytree(BASE, directory)
    (directory / "config.json").write_text(json.dumps(json.loads((BASE / "config.json").read_text()) | changes))
    return directory


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("refusals")
    base: dict[str, Any] = {"model": str(BASE), "learning_rate": 1e-3}
    cases = {name: base | {"megatron": {key: value}} for name, (key, value, _) in MEGATRON.items()}
    cases["stages"] = base | {"pipeline_parallel": 2}
    cases["heads"] = base | {"tensor_parallel": 4}
    cases["shape"] = base | {"model": str(changed_base(folder / "shape", intermediate_size=160))}
    cases["layers"] = base | {"model": str(changed_base(folder / "layers", num_hidden_layers=4))}
    lost = changed_base(folder / "lost")
    tensors = load_file(lost / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    save_file(tensors, lost / "model.safetensors")
    cases["tensor_lost"] = base | {"model": str(lost)}
    (result,) = run_ranks("refusals", 1, cases=cases)
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize("name", MEGATRON)
def test_keys_of_policy_megatron(sentences: dict[str, str], name: str) -> None:
    assert MEGATRON[name][2] in sentences[name]


def test_heads_that_do_not_split(sentences: dict[str, str]) -> None:
    assert sentences["heads"] == (
        "policy.tensor_parallel=4 does not divide the model's num_key_value_heads=2; choose a divisor"
    )


def test_layers_that_do_not_split(sentences: dict[str, str]) -> None:
    assert "policy.pipeline_parallel=2 x policy.virtual_pipeline=1 does not divide" in sentences["stages"]
    assert "policy.megatron.num_layers_in_first_pipeline_stage" in sentences["stages"]


def test_an_objective_of_whole_sequences_and_context_parallelism(tmp_path: Path) -> None:
    torch.save(sampled_batch(BASE), tmp_path / "batch.pt")
    policy: dict[str, Any] = {"model": str(BASE), "learning_rate": 1e-3}
    file = str(tmp_path / "batch.pt")
    for result in run_ranks("whole_sequences", 2, policy=policy | {"context_parallel": 2}, batch_file=file):
        assert result["sequences_True"]
        assert "policy.context_parallel=2 splits" in result["error"]
    (padded,) = run_ranks("whole_sequences", 1, policy=policy, batch_file=file)
    (packed,) = run_ranks("whole_sequences", 1, policy=policy | {"micro_batch_tokens": 60}, batch_file=file)
    assert padded["sequences_False"] == [8]
    assert sum(packed["sequences_False"]) == 8
    assert len(packed["sequences_False"]) > 1
    for norm in (padded["False"], packed["True"], packed["False"]):
        assert norm == pytest.approx(padded["True"], rel=1e-5)


def test_weights_that_do_not_fit_the_configuration(sentences: dict[str, str]) -> None:
    assert "model.layers.0.mlp.gate_proj.weight has the shape (176, 64)" in sentences["shape"]
    assert "config.json has (160, 64)" in sentences["shape"]
    assert "lacks the tensor model.layers.3." in sentences["layers"]


def test_a_missing_tensor(sentences: dict[str, str]) -> None:
    assert "lacks the tensor model.layers.1.self_attn.k_norm.weight" in sentences["tensor_lost"]


def test_every_rank_stops_at_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    torch.save(sampled_batch(BASE), tmp_path / "batch.pt")
    policy = {"model": str(BASE), "tensor_parallel": 2, "learning_rate": 1e-3}
    for sentence in run_ranks("explosion", 2, policy=policy, batch_file=str(tmp_path / "batch.pt")):
        assert "the gradient norm of an update is" in sentence
        assert "resume from the last checkpoint" in sentence


def test_another_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RLVRError, match=r"3 trainer processes were started for policy\.tensor_parallel=2 x"):
        parallel.initialize(tensor_parallel=2, pipeline_parallel=2, data_parallel=1, seed=0)
    assert not torch.distributed.is_initialized()
