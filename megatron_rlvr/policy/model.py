"""Builds the Megatron-Core model, its data-parallel wrapper, optimizer and learning-rate schedule."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlvr.config import PolicyConfig
from megatron_rlvr.core import RLVRError
from megatron_rlvr.policy import parallel
from megatron_rlvr.policy.hf_weights import padded_vocab

_CONFIG_CLASSES = (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
# What this package decides itself, and where.
_OURS = {
    "tensor_model_parallel_size": "policy.tensor_parallel",
    "lr": "policy.learning_rate",
    "optimizer": "policy.learning_rate, which is Adam's",
    "bf16": "policy.precision",
    "fp16": "policy.precision",
    "params_dtype": "policy.precision",
    "calculate_per_token_loss": "the objective, which is a token-mean over the global batch",
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout"), "the objective, whose log-probs are those of the policy sampled from"
    ),
    **dict.fromkeys(
        (
            *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
            *("normalization", "layernorm_epsilon", "qk_layernorm", "gated_linear_unit", "activation_func"),
            *("add_bias_linear", "add_qkv_bias", "rotary_interleaved", "softmax_scale"),
        ),
        "the model's config.json",
    ),
}
_NOT_YET = (
    *("pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size", "sequence_parallel"),
    "use_distributed_optimizer",  # without TransformerEngine its checkpoints do not load into a new process
    "overlap_param_gather",  # a resync after the update would send what is not gathered yet
)


def check_passthrough(options: Mapping[str, Any]) -> None:
    """Refuse keys of ``policy.megatron`` that Megatron-Core does not know, or that would contradict ours.

    Raises:
        RLVRError: Naming the key and the nearest valid one.
    """
    known = {entry.name for cls in _CONFIG_CLASSES for entry in dataclasses.fields(cls)}
    for key in options:
        if key in _OURS:
            raise RLVRError(f"policy.megatron.{key} is decided by {_OURS[key]}; remove it from policy.megatron")
        if key in _NOT_YET:
            raise RLVRError(
                f"policy.megatron.{key} is not supported yet; remove it (the layouts so far are "
                "policy.tensor_parallel x policy.data_parallel)"
            )
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1, 0.0)[0]
            raise RLVRError(f"policy.megatron.{key} is no key of Megatron-Core's; did you mean {near}?")


def build_model(config: PolicyConfig, hf_config: Mapping[str, Any]) -> DistributedDataParallel:
    """The model of this rank, randomly initialised, wrapped in Megatron's data parallelism.

    Args:
        config: Layout, precision and passthrough options.
        hf_config: The ``config.json`` that fixes the architecture.

    Raises:
        RLVRError: If heads do not split over ``policy.tensor_parallel``.
    """
    _check_divisible(config, hf_config)
    transformer = _transformer_config(config, hf_config)
    module: torch.nn.Module = GPTModel(
        transformer,
        _layer_spec(),
        vocab_size=padded_vocab(int(hf_config["vocab_size"]), config.tensor_parallel),
        max_sequence_length=int(hf_config["max_position_embeddings"]),
        parallel_output=True,
        share_embeddings_and_output_weights=bool(hf_config.get("tie_word_embeddings", False)),
        position_embedding_type="rope",
        rotary_base=_rope_theta(hf_config),
    )
    _hand_over_hidden_states(module)
    module = module.to(parallel.device())
    if config.precision == "bf16":
        module = Float16Module(transformer, module)
    ddp_config = _build(DistributedDataParallelConfig, config.megatron, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(transformer, ddp_config, module)
    transformer.finalize_model_grads_func = finalize_model_grads
    return model


def _hand_over_hidden_states(module: torch.nn.Module) -> None:
    """Make the model return the hidden states that enter its output layer, so that no logits are ever materialised.

    The layer stays where it is: its weight is loaded, reduced, stepped and saved as ever, and `output_weight` gives it.
    """

    def hand_over(hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return hidden, None

    layer: Any = module.output_layer
    layer.forward = hand_over


def output_weight(module: torch.nn.Module) -> torch.nn.Parameter:
    """This rank's rows of the output layer's weight, the embedding's where the two are tied."""
    if module.share_embeddings_and_output_weights:
        weight: torch.nn.Parameter = module.shared_embedding_or_output_weight()  # type: ignore[operator]
        return weight
    layer: Any = module.output_layer
    tensor: torch.nn.Parameter = layer.weight
    return tensor


def build_optimizer(
    config: PolicyConfig, model: DistributedDataParallel, total_steps: int
) -> tuple[Any, OptimizerParamScheduler]:
    """Megatron's Adam and its learning-rate schedule, which advances once per rollout step.

    Args:
        config: Learning rate, schedule, precision and passthrough options.
        model: The wrapped model.
        total_steps: Rollout steps of the run; a cosine schedule ends there at 0 (or ``policy.megatron.min_lr``).
    """
    settings = _build(
        OptimizerConfig,
        config.megatron,
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=0.0,  # the parameter groups carry it, and a cosine schedule reads it there
        bf16=config.precision == "bf16",
        params_dtype=_dtype(config),
    )
    optimizer = get_megatron_optimizer(settings, [model])
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=config.learning_rate,
        max_lr=config.learning_rate,
        min_lr=settings.min_lr,
        lr_warmup_steps=0,
        lr_decay_steps=total_steps,
        lr_decay_style=config.lr_schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )
    return optimizer, schedule


def _transformer_config(config: PolicyConfig, hf: Mapping[str, Any]) -> TransformerConfig:
    on_gpu = parallel.device().type == "cuda"
    cpu_only: dict[str, Any] = {
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
    }
    return _build(
        TransformerConfig,
        config.megatron,
        num_layers=int(hf["num_hidden_layers"]),
        hidden_size=int(hf["hidden_size"]),
        ffn_hidden_size=int(hf["intermediate_size"]),
        num_attention_heads=int(hf["num_attention_heads"]),
        num_query_groups=int(hf["num_key_value_heads"]),
        kv_channels=int(hf["head_dim"]),
        normalization="RMSNorm",
        layernorm_epsilon=float(hf["rms_norm_eps"]),
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=config.tensor_parallel,
        calculate_per_token_loss=True,
        bf16=config.precision == "bf16",
        params_dtype=_dtype(config),
        pipeline_dtype=_dtype(config),
        **({} if on_gpu else cpu_only),
    )


def _build(cls: type[Any], options: Mapping[str, Any], **ours: Any) -> Any:
    """``cls`` from our settings, overridden by those of ``options`` that it has."""
    names = {entry.name for entry in dataclasses.fields(cls)}
    return cls(**{**ours, **{key: value for key, value in options.items() if key in names}})


def _layer_spec() -> ModuleSpec:
    """TransformerEngine's layers where there is a GPU, Megatron-Core's own elsewhere."""
    if parallel.device().type != "cuda":
        return get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    if importlib.util.find_spec("transformer_engine") is None:
        raise RLVRError("a GPU is present but TransformerEngine is not; run: pip install 'megatron-rlvr[gpu]'")
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)


def _dtype(config: PolicyConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def _rope_theta(hf: Mapping[str, Any]) -> int:
    parameters = hf.get("rope_parameters") or {}
    return int(parameters.get("rope_theta", hf.get("rope_theta", 10000)))


def _check_divisible(config: PolicyConfig, hf: Mapping[str, Any]) -> None:
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if int(hf[key]) % config.tensor_parallel:
            raise RLVRError(
                f"policy.tensor_parallel={config.tensor_parallel} does not divide the model's {key}={hf[key]}; "
                "choose a divisor"
            )


def unwrapped(model: DistributedDataParallel) -> torch.nn.Module:
    """The bare GPTModel inside the data-parallel and precision wrappers."""
    module: torch.nn.Module = model.module
    return module.module if isinstance(module, Float16Module) else module


def tensor_parallel_group() -> torch.distributed.ProcessGroup:
    """The ranks that share this copy of the model."""
    group: torch.distributed.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def data_parallel_group() -> torch.distributed.ProcessGroup:
    """The ranks that hold the same shard of different copies."""
    group: torch.distributed.ProcessGroup = parallel_state.get_data_parallel_group()
    return group
