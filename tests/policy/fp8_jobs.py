"""What Megatron-Core is told about FP8, as far as a machine without a GPU can see it; imported by the nursery only."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from policy_jobs import initialize, next_update, update_rows
from policy_models import TEMPERATURE

from megatron_rlvr.config import PolicyConfig
from megatron_rlvr.policy import precision
from megatron_rlvr.policy.hf_weights import TensorReader, load_weights
from megatron_rlvr.policy.policy import Policy


def fp8_graph(policy: dict[str, Any], batch_file: str) -> dict[str, Any]:
    """Builds the policy as on a GPU, trains it, and notes which layers Megatron-Core would have run in FP8.

    TransformerEngine is what makes FP8 of it; in its place this machine has Megatron-Core's contexts that do nothing.
    """
    from megatron.core.transformer import transformer_block

    initialize(policy)
    precision._check_machine = precision.check_fp8_device = lambda: None
    contexts: set[tuple[str, int]] = set()
    slots: set[int] = set()

    def noted(config: Any, layer: int = -1, is_init: bool = False) -> Any:
        contexts.add(("init" if is_init else "run", layer))
        return nullcontext()

    transformer_block.get_fp8_context = noted
    trained = Policy(PolicyConfig(**policy), temperature=TEMPERATURE, total_steps=10)
    for module in trained.modules:
        for layer in module.decoder.layers:
            layer.mlp.linear_fc1.register_forward_pre_hook(lambda _, given: slots.add(given[0].shape[:-1].numel()))
    rows = next(update_rows(batch_file))
    stats = trained.log_probs(rows.tokens_BL, rows.mask_BL)
    after = next_update(trained, rows)
    transformer, optimizer = trained.modules[0].config, trained.optimizer.chained_optimizers[0].config
    # TransformerEngine keeps the unrounded value of an FP8 parameter for the optimizer; it has to be the loaded one.
    weight = trained.modules[0].decoder.layers[0].mlp.linear_fc1.weight
    kept = torch.zeros_like(weight)
    weight.get_high_precision_init_val = lambda: kept
    load_weights(trained.modules[0], trained._weights, TensorReader(policy["model"]), rank=0, parts=1)
    return {
        "precise": torch.equal(kept, weight),
        "transformer": {name: value for name, value in vars(transformer).items() if "fp8" in name or "bf16" in name},
        "optimizer": {name: getattr(optimizer, name) for name in ("bf16", "fp8_recipe", "params_dtype")},
        "gather": trained.models[0].ddp_config.fp8_param_gather,
        "contexts": contexts,
        "slots": slots,
        "logprobs": stats.logprobs_BL,
        "head": trained.modules[-1].output_layer.weight.dtype,
        "dtypes": {weight.dtype for weight in after["weights"].values()},
        "finite": all(weight.isfinite().all() for weight in after["weights"].values()),
    }


def bf16_logprobs(policy: dict[str, Any], batch_file: str) -> torch.Tensor:
    initialize(policy)
    rows = next(update_rows(batch_file))
    trained = Policy(PolicyConfig(**policy), temperature=TEMPERATURE, total_steps=10)
    return trained.log_probs(rows.tokens_BL, rows.mask_BL).logprobs_BL
