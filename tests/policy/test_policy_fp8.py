"""FP8 as far as a machine without a GPU can tell: what is refused, what Megatron-Core is told, what shapes it gets."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_models import BASE, random_batch, write_odd_model
from policy_ranks import run_ranks

from megatron_rlvr.config import PolicyConfig, load_config
from megatron_rlvr.core import RLVRError
from megatron_rlvr.policy import precision
from megatron_rlvr.policy.micro_batches import Cut, TrainingRows, cut_micro_batch
from megatron_rlvr.training.launch import preflight

EVEN = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def policy_of(name: str = "fp8", **megatron: Any) -> PolicyConfig:
    return PolicyConfig(model=str(BASE), precision=name, megatron=megatron)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has all that is asked of it."""
    find_spec = importlib.util.find_spec
    engine = importlib.machinery.ModuleSpec("transformer_engine", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: engine if name == "transformer_engine" else find_spec(name)
    )


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (policy_of("bf16", fp8="hybrid"), r"megatron\.fp8 does nothing with policy\.precision=bf16; set it to fp8"),
        (policy_of("fp32", first_last_layers_bf16=True), r"first_last_layers_bf16 does nothing with .*=fp32"),
        (policy_of(fp8_recipe="mxfp8"), r"fp8_recipe is 'mxfp8'; it is one of delayed, tensorwise, blockwise"),
        (policy_of(first_last_layers_bf16=True), r"does not go with fp8_recipe=delayed.* tensorwise or blockwise"),
        (policy_of(fp8_param_gather=True), r"set policy\.megatron\.use_distributed_optimizer=true, too"),
    ],
)
def test_options_that_contradict_are_refused(config: PolicyConfig, said: str) -> None:
    with pytest.raises(RLVRError, match=said):
        precision.check_precision(config)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("recipe", precision.FP8_RECIPES)
def test_every_recipe_is_accepted_where_it_can_run(recipe: str) -> None:
    precision.check_precision(policy_of(fp8_recipe=recipe))
    precision.check_fp8_device()


@pytest.mark.usefixtures("hopper")
def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(RLVRError, match=r"8\.9 or above .* this is NVIDIA A100; use bf16"):
        precision.check_fp8_device()


@pytest.mark.usefixtures("hopper")
def test_a_missing_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RLVRError, match=r"needs TransformerEngine; run: pip install 'megatron-rlvr\[gpu\]'"):
        precision.check_precision(policy_of())


def test_the_launcher_refuses_it_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    required = [f"run.dir={tmp_path}", "data.train=countdown:train", f"policy.model={BASE}"]
    preflight(load_config(None, [*required, "policy.precision=bf16"]))
    with pytest.raises(RLVRError, match=r"policy\.precision=fp8 needs an NVIDIA GPU"):
        preflight(load_config(None, [*required, "policy.precision=fp8"]))


def test_layers_whose_sides_are_no_multiples_of_16_are_refused() -> None:
    with pytest.raises(RLVRError, match="intermediate_size leaves every tensor-parallel rank 24"):
        precision.check_fp8_sizes({"hidden_size": 64, "intermediate_size": 24})
    precision.check_fp8_sizes({"hidden_size": 64, "intermediate_size": 32})


@pytest.mark.parametrize("recipe", [None, "tensorwise", "blockwise"])
def test_what_megatron_core_is_told(tmp_path: Path, recipe: str | None) -> None:
    model = write_odd_model(tmp_path / "even", num_hidden_layers=4, **EVEN)
    torch.save(random_batch(37), tmp_path / "batch.pt")
    options = {"fp8_recipe": recipe, "first_last_layers_bf16": True, "fp8": "e4m3"} if recipe else {}
    policy = {"model": str(model), "learning_rate": 1e-3, "micro_batch": 3, "precision": "fp8", "megatron": options}
    file = str(tmp_path / "batch.pt")
    (result,) = run_ranks("fp8_jobs.fp8_graph", 1, policy=policy, batch_file=file)
    assert result["transformer"]["fp8"] == ("e4m3" if recipe else "hybrid")
    assert result["transformer"]["fp8_recipe"] == result["optimizer"]["fp8_recipe"] == (recipe or "delayed")
    assert result["transformer"]["bf16"]
    assert result["transformer"]["first_last_layers_bf16"] == bool(recipe)
    # delayed scaling has one context around all layers, the others one for each
    layers = {layer for kind, layer in result["contexts"] if kind == "run"}
    assert layers == ({0, 1, 2, 3} if recipe else {-1})
    assert all(count % 16 == 0 for count in result["slots"])
    assert result["head"] == torch.bfloat16
    assert result["logprobs"].dtype == torch.float32
    assert result["dtypes"] == {torch.bfloat16}
    assert result["finite"]
    (plain,) = run_ranks(
        "fp8_jobs.bf16_logprobs", 1, policy=policy | {"precision": "bf16", "megatron": {}}, batch_file=file
    )
    # without TransformerEngine the only difference is the padding, which changes the order of some sums
    torch.testing.assert_close(result["logprobs"], plain, rtol=0.0, atol=0.05)


def test_parameters_gathered_in_fp8(tmp_path: Path) -> None:
    model = write_odd_model(tmp_path / "even", **EVEN)
    torch.save(random_batch(37), tmp_path / "batch.pt")
    options = {"fp8_param_gather": True, "use_distributed_optimizer": True, "overlap_param_gather": True}
    options |= {"overlap_grad_reduce": True}
    policy = {"model": str(model), "learning_rate": 1e-3, "precision": "fp8", "megatron": options, "data_parallel": 2}
    for result in run_ranks("fp8_jobs.fp8_graph", 2, policy=policy, batch_file=str(tmp_path / "batch.pt")):
        assert result["gather"]
        assert result["transformer"]["fp8_param"]
        assert any(kind == "init" for kind, _ in result["contexts"])
        assert result["precise"]


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=6),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_fp8_slots_are_padded_and_predict_the_same_tokens(
    lengths: list[int], context: int, tensor: int, packed: bool
) -> None:
    width = max(lengths)
    used_BL = torch.arange(width) < torch.tensor(lengths)[:, None]
    mask_BL = used_BL & (torch.arange(width) > 0)
    rows = TrainingRows(torch.randint(1, 50, (len(lengths), width)) * used_BL, mask_BL, {})
    found: list[tuple[int, int, int]] = []
    for rank in range(context):
        cut = Cut(context, rank, tensor, slots=16)
        batch = cut_micro_batch(rows, torch.arange(len(lengths)), cut, packed=packed)
        assert batch.tokens_BS.shape[1] % 16 == 0
        assert batch.tokens_BS.shape[1] % tensor == 0
        if batch.lengths is not None:
            assert sum(batch.lengths) == context * batch.tokens_BS.shape[1]
            assert all(length % cut.chunks == 0 for length in batch.lengths)
        found += zip(batch.rows_R.tolist(), batch.columns_R.tolist(), batch.targets_R.tolist(), strict=True)
    assert sorted(found) == [(b, s, int(rows.tokens_BL[b, s])) for b, s in mask_BL.nonzero().tolist()]
