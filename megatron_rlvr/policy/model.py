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
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlvr.config import PIPELINE_SPLIT, PolicyConfig
from megatron_rlvr.core import RLVRError
from megatron_rlvr.policy import parallel, precision
from megatron_rlvr.policy.architecture import Architecture
from megatron_rlvr.policy.gpu_memory import gradient_accumulation_fusion
from megatron_rlvr.policy.local_layers import LocalAttention, LocalNorm

_CONFIG_CLASSES = (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
# What this package decides itself, and where.
_OURS = {
    "tensor_model_parallel_size": "policy.tensor_parallel",
    "pipeline_model_parallel_size": "policy.pipeline_parallel",
    "virtual_pipeline_model_parallel_size": "policy.virtual_pipeline",
    "context_parallel_size": "policy.context_parallel",
    "sequence_parallel": "policy.sequence_parallel",
    "variable_seq_lengths": "the micro-batches, whose lengths differ",
    "lr": "policy.learning_rate",
    "optimizer": "policy.learning_rate, which is Adam's",
    "bf16": "policy.precision",
    "fp16": "policy.precision",
    "params_dtype": "policy.precision",
    "fp8_param": "policy.megatron.fp8_param_gather",
    "calculate_per_token_loss": "the objective, which is a token-mean over the global batch",
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout"), "the objective, whose log-probs are those of the policy sampled from"
    ),
    **dict.fromkeys(
        (
            *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
            *("normalization", "layernorm_epsilon", "qk_layernorm", "gated_linear_unit", "activation_func"),
            *("add_bias_linear", "add_qkv_bias", "rotary_interleaved", "softmax_scale"),
            "layernorm_zero_centered_gamma",
        ),
        "the model's config.json",
    ),
}
_NOT_YET = (
    *("expert_model_parallel_size", "hybrid_context_parallel", "use_megatron_fsdp"),
    "overlap_param_gather_with_optimizer_step",  # splits the optimizer by pipeline chunk
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
                f"policy.megatron.{key} is not supported yet; remove it (the layouts so far are tensor, pipeline, "
                "context and data parallelism)"
            )
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1, 0.0)[0]
            raise RLVRError(f"policy.megatron.{key} is no key of Megatron-Core's; did you mean {near}?")
    if options.get("overlap_param_gather") and not options.get("use_distributed_optimizer"):
        raise RLVRError(
            "policy.megatron.overlap_param_gather=true gathers what a distributed optimizer has split; set "
            "policy.megatron.use_distributed_optimizer=true, too"
        )


def build_models(config: PolicyConfig, hf_config: Mapping[str, Any]) -> list[DistributedDataParallel]:
    """This rank's part of the model, randomly initialised, wrapped in Megatron's data parallelism.

    Args:
        config: Layout, precision and passthrough options.
        hf_config: The ``config.json`` that fixes the architecture.

    Returns:
        The rank's pipeline stage: one module, or one for each of its ``policy.virtual_pipeline`` chunks.

    Raises:
        RLVRError: If heads do not split over ``policy.tensor_parallel``, or layers over the pipeline.
    """
    architecture = Architecture.of(hf_config)
    architecture.check_divisible(config.tensor_parallel)
    precision.check_precision(config)
    if config.precision == "fp8":
        precision.check_fp8_device()
        precision.check_fp8_sizes(architecture.widths(config.tensor_parallel))
    _check_pipeline(config, architecture)
    transformer = transformer_config(config, architecture)
    ddp_config = _build(DistributedDataParallelConfig, config.megatron, grad_reduce_in_fp32=True)
    models = []
    for chunk in range(config.virtual_pipeline):
        stage: dict[str, Any] = {"vp_stage": chunk if config.virtual_pipeline > 1 else None}
        spec = _block_spec(architecture, transformer, **stage)
        ends = {
            "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, **stage),
            "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, **stage),
        }
        module = architecture.build(transformer, spec, config.tensor_parallel, **ends, **stage)
        if ends["post_process"]:
            _hand_over_hidden_states(module)
        module = module.to(parallel.device())
        if precision.half(config):
            module = Float16Module(transformer, module)
        models.append(DistributedDataParallel(transformer, ddp_config, module, disable_bucketing=chunk > 0))
    transformer.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        # The schedules leave this context for the last micro-batch, whose backward pass then starts the reduction.
        no_sync = [model.no_sync for model in models]
        transformer.no_sync_func = no_sync if len(models) > 1 else no_sync[0]
    return models


def _check_pipeline(config: PolicyConfig, architecture: Architecture) -> None:
    parts = config.pipeline_parallel * config.virtual_pipeline
    if architecture.layers % parts and not any(key in config.megatron for key in PIPELINE_SPLIT):
        raise RLVRError(
            f"policy.pipeline_parallel={config.pipeline_parallel} x policy.virtual_pipeline={config.virtual_pipeline} "
            f"does not divide the model's {architecture.layers} layers; choose a divisor, or say how to split them "
            f"with policy.megatron.{PIPELINE_SPLIT[0]} or another of Megatron-Core's keys"
        )


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
    config: PolicyConfig, models: list[DistributedDataParallel], total_steps: int
) -> tuple[Any, OptimizerParamScheduler]:
    """Megatron's Adam and its learning-rate schedule, which advances once per rollout step.

    Args:
        config: Learning rate, schedule, precision and passthrough options.
        models: The wrapped modules of this rank.
        total_steps: Rollout steps of the run; a cosine schedule ends there at 0 (or ``policy.megatron.min_lr``).
    """
    settings = _build(
        OptimizerConfig,
        config.megatron,
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=0.0,  # the parameter groups carry it, and a cosine schedule reads it there
        **precision.optimizer_settings(config),
    )
    optimizer = get_megatron_optimizer(settings, models)
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


def transformer_config(config: PolicyConfig, architecture: Architecture) -> TransformerConfig:
    """Megatron-Core's configuration of the architecture in this layout and precision."""
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
    gpu_only = {"gradient_accumulation_fusion": gradient_accumulation_fusion()} if on_gpu else {}
    return _build(
        TransformerConfig,
        config.megatron,
        **architecture.transformer_settings(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context_parallel,
        sequence_parallel=config.sequence_parallel,
        variable_seq_lengths=config.pipeline_parallel > 1,
        moe_token_dispatcher_type="alltoall",  # asked for with variable lengths, even of a dense model
        # In one batch, two stages' activations and gradients would be taken for each other.
        overlap_p2p_comm=config.virtual_pipeline > 1,
        batch_p2p_comm=config.virtual_pipeline == 1,
        calculate_per_token_loss=True,
        **precision.transformer_settings(config),
        **(gpu_only if on_gpu else cpu_only),
    )


def _build(cls: type[Any], options: Mapping[str, Any], **ours: Any) -> Any:
    """``cls`` from our settings, overridden by those of ``options`` that it has."""
    names = {entry.name for entry in dataclasses.fields(cls)}
    return cls(**{**ours, **{key: value for key, value in options.items() if key in names}})


def layer_spec(architecture: Architecture) -> ModuleSpec:
    """TransformerEngine's layers where there is a GPU, Megatron-Core's own elsewhere."""
    if parallel.device().type != "cuda":
        return _local_layer_spec(architecture)
    if importlib.util.find_spec("transformer_engine") is None:
        raise RLVRError("a GPU is present but TransformerEngine is not; run: pip install 'megatron-rlvr[gpu]'")
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.qk_norm)


def _local_layer_spec(architecture: Architecture) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(qk_layernorm=architecture.qk_norm, normalization="RMSNorm")
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = LocalNorm
    attention.core_attention = LocalAttention
    if architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = LocalNorm
    return spec


def _block_spec(
    architecture: Architecture, transformer: TransformerConfig, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """`layer_spec` for the layers of this pipeline stage, and the norm after the last one."""
    spec = layer_spec(architecture)
    if parallel.device().type == "cuda":
        return spec
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(transformer, vp_stage=vp_stage), layer_norm=LocalNorm
    )


def unwrapped(model: DistributedDataParallel) -> torch.nn.Module:
    """The bare GPTModel inside the data-parallel and precision wrappers."""
    module: torch.nn.Module = model.module
    return module.module if isinstance(module, Float16Module) else module


def tensor_parallel_group() -> torch.distributed.ProcessGroup:
    """The ranks that share this copy of the model."""
    group: torch.distributed.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def pipeline_parallel_group() -> torch.distributed.ProcessGroup:
    """The ranks that hold the stages of this copy of the model."""
    group: torch.distributed.ProcessGroup = parallel_state.get_pipeline_model_parallel_group()
    return group
