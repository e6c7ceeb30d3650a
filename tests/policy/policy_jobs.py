"""What the ranks of the policy's tests do; imported by the nursery only, because it imports Megatron-Core."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # wraps torch.manual_seed when first imported, which must not look like our doing
from policy_models import CLIP, POSITIVE_WEIGHT, TEMPERATURE

from megatron_rlvr.policy import cpu_runtime

_PLACES = (torch, torch.cuda, torch.Tensor, torch.nn.Module, torch.distributed, torch.random)
_BEFORE = [(place, name, inspect.getattr_static(place, name)) for place in _PLACES for name in dir(place)]
cpu_runtime.install()

from megatron.core import __version__ as megatron_version  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402

from megatron_rlvr.config import ObjectiveConfig, PolicyConfig  # noqa: E402
from megatron_rlvr.core import RLVRError, RolloutBatch, SamplingParams, StepMetrics  # noqa: E402
from megatron_rlvr.entropy import EntropyGuided  # noqa: E402
from megatron_rlvr.objective import LossInputs, LossOutputs, policy_loss  # noqa: E402
from megatron_rlvr.policy import parallel  # noqa: E402
from megatron_rlvr.policy.checkpoint import export_hf, load_policy, save_policy  # noqa: E402
from megatron_rlvr.policy.hf_weights import WeightMap, named_full_tensors  # noqa: E402
from megatron_rlvr.policy.policy import Policy, TrainingRows  # noqa: E402
from megatron_rlvr.rollout import EmbeddedEngine, load_tokenizer, pad_id  # noqa: E402
from megatron_rlvr.training.phases import minibatches, prepare  # noqa: E402

Tensors = dict[str, torch.Tensor]
GRADIENT = "main_grad"  # where Megatron-Core keeps a parameter's gradient, in fp32


def layout(
    policy: dict[str, Any], batch_file: str, micro_batches: list[int], export: str | None = None
) -> dict[str, Any]:
    """Everything that must not depend on the layout, for several micro-batch sizes."""
    initialize(policy)
    batch = torch.load(batch_file)
    results = {size: one_step(policy | {"micro_batch": size}, batch, export) for size in micro_batches}
    return {
        "version": megatron_version,
        "steps": results,
        "gradient": gradient(policy | {"micro_batch": micro_batches[-1]}, batch),
    }


def initialize(policy: dict[str, Any]) -> None:
    parallel.initialize(tensor_parallel=policy["tensor_parallel"], data_parallel=policy.get("data_parallel", 1), seed=0)


def one_step(settings: dict[str, Any], batch: Tensors, export: str | None) -> dict[str, Any]:
    """A training step without the rollout: log-probs, advantages, three updates, the controller."""
    policy = Policy(PolicyConfig(**settings), temperature=TEMPERATURE, total_steps=10)
    loaded = weights_of(policy)
    rollout = rollout_batch(batch)
    logprobs_BL, entropy_BL = policy.log_probs(rollout.tokens_BL, rollout.response_mask_BL)
    prepared = prepare(rollout, logprobs_BL, entropy_BL, StepMetrics())
    controller = EntropyGuided(target=1.5, initial=0.5)
    objective = with_loss(controller.value)
    updates = []
    for rows in minibatches(prepared, ObjectiveConfig(minibatches=3), seed=1):
        metrics = StepMetrics()
        policy.update(rows, objective, metrics)
        updates.append(policy.reduce_metrics(metrics).means())
    controller.update(prepared.entropy)
    policy.step_schedule()
    if export is not None:
        export_hf(policy, Path(export))
    return {
        "loaded": loaded,
        "logprobs": logprobs_BL,
        "entropy": entropy_BL,
        "mean_entropy": prepared.entropy,
        "positive_weight": controller.value,
        "updates": updates,
        "learning_rate": policy.learning_rate,
        "weights": weights_of(policy),
    }


def gradient(settings: dict[str, Any], batch: Tensors) -> dict[str, Any]:
    """One update over the whole batch with ratios on both sides of the clip range: gradient and new weights."""
    unclipped = settings | {"megatron": settings["megatron"] | {"clip_grad": 1e9}}
    policy = Policy(PolicyConfig(**unclipped), temperature=TEMPERATURE, total_steps=10)
    widths: set[int] = set()
    policy.module.register_forward_hook(lambda _, __, output: widths.add(output.shape[-1]))
    rollout, metrics = rollout_batch(batch), StepMetrics()
    logprobs_BL, entropy_BL = policy.log_probs(rollout.tokens_BL, rollout.response_mask_BL)
    rows = prepare(rollout, logprobs_BL, entropy_BL, StepMetrics()).rows
    rows.old_logprobs_BL.add_(batch["drift_BL"])
    policy.update(rows, with_loss(POSITIVE_WEIGHT), metrics)
    # already reduced over the ranks and divided by the number of tokens
    grads: Any = [(name, getattr(parameter, GRADIENT)) for name, parameter in policy.module.named_parameters()]
    shim: Any = SimpleNamespace(named_parameters=lambda: iter(grads))
    group = parallel_state.get_tensor_model_parallel_group()
    return {
        "output_widths": widths,
        "old_logprobs": rows.old_logprobs_BL,
        "metrics": policy.reduce_metrics(metrics).means(),
        "grads": {name: grad.clone() for name, grad in named_full_tensors(shim, WeightMap(policy.hf_config), group)},
        "weights": weights_of(policy),
    }


def with_loss(positive_weight: float) -> Any:
    """The clipped objective, which also reports the loss itself."""

    def objective(inputs: LossInputs) -> LossOutputs:
        outputs = policy_loss(inputs, clip_low=CLIP, clip_high=CLIP, positive_weight=positive_weight)
        outputs.metrics["loss"] = (outputs.loss_sum.detach().double(), outputs.count)
        return outputs

    return objective


def rollout_batch(batch: Tensors) -> RolloutBatch:
    return RolloutBatch(
        tokens_BL=batch["tokens_BL"],
        response_mask_BL=batch["response_mask_BL"],
        rollout_logprobs_BL=torch.zeros(batch["tokens_BL"].shape),
        groups_B=batch["groups_B"],
        rewards_B=batch["rewards_B"],
        valid_B=batch["valid_B"],
        weight_version=0,
    )


def weights_of(policy: Policy) -> Tensors:
    return {name: tensor.clone() for name, tensor in policy.named_tensors()}


def save_checkpoint(policy: dict[str, Any], batch_file: str, directory: str) -> dict[str, Any]:
    """Two updates, a checkpoint, and one more update."""
    initialize(policy)
    trained = Policy(PolicyConfig(**policy), temperature=TEMPERATURE, total_steps=10)
    loaded = weights_of(trained)
    updates = update_rows(batch_file)
    for rows in (next(updates), next(updates)):
        trained.update(rows, with_loss(0.5), StepMetrics())
        trained.step_schedule()
        torch.rand(3)
        with get_cuda_rng_tracker().fork():
            torch.rand(5)
    save_policy(trained, Path(directory))
    return {"loaded": loaded, "saved": state_of(trained), "next": next_update(trained, next(updates))}


def load_checkpoint(policy: dict[str, Any], batch_file: str, directory: str) -> dict[str, Any]:
    """The same third update after loading that checkpoint in processes that have done something else."""
    initialize(policy)
    torch.manual_seed(4321)
    trained = Policy(PolicyConfig(**policy), temperature=TEMPERATURE, total_steps=10)
    try:
        load_policy(trained, Path(directory))
    except RLVRError as error:
        return {"error": str(error)}
    return {"saved": state_of(trained), "next": next_update(trained, list(update_rows(batch_file))[2])}


def update_rows(batch_file: str) -> Iterator[TrainingRows]:
    batch = torch.load(batch_file)
    rollout = rollout_batch(batch)
    prepared = prepare(rollout, batch["drift_BL"] - 2.0, torch.ones(batch["drift_BL"].shape), StepMetrics())
    return minibatches(prepared, ObjectiveConfig(minibatches=3), seed=2)


def state_of(policy: Policy) -> dict[str, Any]:
    with get_cuda_rng_tracker().fork():
        tracked = torch.get_rng_state()
    return {
        "weights": weights_of(policy),
        "optimizer": copy.deepcopy(policy.optimizer.state_dict()),
        "schedule": policy.schedule.state_dict(),
        "learning_rate": policy.learning_rate,
        "rng": torch.get_rng_state(),
        "tracked_rng": tracked,
    }


def next_update(policy: Policy, rows: TrainingRows) -> dict[str, Any]:
    policy.update(rows, with_loss(0.5), StepMetrics())
    policy.step_schedule()
    return {"draws": torch.rand(4), **state_of(policy)}


def resync(policy: dict[str, Any], batch_file: str, prompts: list[str]) -> list[dict[str, Any]]:
    """The engine's log-probs of what it samples and the trainer's, before and after an update."""
    initialize(policy)
    trained = Policy(PolicyConfig(**policy), temperature=TEMPERATURE, total_steps=10)
    tokenizer = load_tokenizer(policy["model"])
    engine = EmbeddedEngine(policy["model"], tokenizer, parallel.device())
    sampling = SamplingParams(temperature=TEMPERATURE, max_new_tokens=10, samples_per_prompt=4, seed=3)
    reports = []
    for version, rows in enumerate(update_rows(batch_file)):
        engine.resync(trained.named_tensors(), version)
        batch = RolloutBatch.from_samples(engine.generate(prompts, sampling), pad_id(tokenizer))
        logprobs_BL, _ = trained.log_probs(batch.tokens_BL, batch.response_mask_BL)
        reports.append({"version": batch.weight_version, "engine": batch.rollout_logprobs_BL, "trainer": logprobs_BL})
        trained.update(rows, with_loss(0.5), StepMetrics())
    return reports


def explosion(policy: dict[str, Any], batch_file: str) -> str:
    """What an update says whose gradient is not finite."""
    initialize(policy)
    trained = Policy(PolicyConfig(**policy), temperature=TEMPERATURE, total_steps=10)
    rows = next(update_rows(batch_file))
    rows.advantages_BL[rows.mask_BL] = torch.inf
    try:
        trained.update(rows, with_loss(0.5), StepMetrics())
    except RLVRError as error:
        return str(error)
    return "updated"


def refusals(cases: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What building each policy raises; one rank is enough because nothing is exchanged before."""
    initialize({"tensor_parallel": 1})
    return {name: refusal(policy) for name, policy in cases.items()}


def refusal(policy: dict[str, Any]) -> str:
    try:
        Policy(PolicyConfig(**policy), temperature=1.0, total_steps=1)
    except RLVRError as error:
        return str(error)
    return "built"


def runtime() -> dict[str, Any]:
    """What the CPU runtime changed in torch, and whether a second `install` changes anything in Megatron-Core."""
    patched = {
        f"{place.__name__}.{name}"
        for place, name, value in _BEFORE
        if name not in ("__dict__", "__weakref__") and inspect.getattr_static(place, name) is not value
    }
    before = megatron_names()
    cpu_runtime.install()
    unknown = ""
    try:
        parallel_state.torch.cuda.get_device_properties(0)
    except (AssertionError, RuntimeError) as error:
        unknown = str(error)
    return {
        "patched": patched,
        "device": parallel_state.torch.zeros(1, device=parallel_state.torch.cuda.current_device()).device.type,
        "unknown": unknown,
        "changed_by_second_install": [key for key, value in megatron_names().items() if before.get(key) is not value],
        "triton": [name for name in sys.modules if name.partition(".")[0] == "triton"],
    }


def megatron_names() -> dict[tuple[str, str], Any]:
    modules = [(name, module) for name, module in sys.modules.items() if name.startswith("megatron.core")]
    return {(name, key): value for name, module in modules for key, value in list(vars(module).items())}
