"""What the ranks of the policy's tests do; imported by the nursery only, because it imports Megatron-Core."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # wraps torch.manual_seed when first imported, which must not look like our doing
from policy_models import CLIP, POSITIVE_WEIGHT, TEMPERATURE, exact_advantages

from megatron_rlvr.policy import cpu_runtime

_PLACES = (torch, torch.cuda, torch.Tensor, torch.nn.Module, torch.distributed, torch.random)
_BEFORE = [(place, name, inspect.getattr_static(place, name)) for place in _PLACES for name in dir(place)]
cpu_runtime.install()

from megatron.core import __version__ as megatron_version  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402

from megatron_rlvr.config import PolicyConfig  # noqa: E402
from megatron_rlvr.core import RLVRError, RolloutBatch, SamplingParams, StepMetrics  # noqa: E402
from megatron_rlvr.objective import LossInputs, LossOutputs, Objective  # noqa: E402
from megatron_rlvr.policy import checkpoint, parallel  # noqa: E402
from megatron_rlvr.policy.hf_export import export_hf  # noqa: E402
from megatron_rlvr.policy.hf_weights import WeightMap, named_full_tensors  # noqa: E402
from megatron_rlvr.policy.policy import Policy, TrainingRows  # noqa: E402
from megatron_rlvr.rollout import EmbeddedEngine, load_tokenizer, pad_id  # noqa: E402

Tensors = dict[str, torch.Tensor]
NUCLEUS = 0.9
GRADIENT = "main_grad"  # where Megatron-Core keeps a parameter's gradient, in fp32


def layout(
    policy: dict[str, Any], batch_file: str, micro_batches: list[int], export: str | None = None
) -> dict[str, Any]:
    """Everything that must not depend on the layout, for several micro-batch sizes."""
    initialize(policy)
    batch = torch.load(batch_file)
    results = {size: one_step(sized(policy, size), batch, export) for size in micro_batches}
    return {
        "version": megatron_version,
        "steps": results,
        "gradient": gradient(sized(policy, micro_batches[-1]), batch),
    }


def sized(policy: dict[str, Any], size: int) -> dict[str, Any]:
    """Micro-batches of ``size`` rows, or of as many times the tokens that the settings say."""
    return policy | {"micro_batch": size, "micro_batch_tokens": size * policy.get("micro_batch_tokens", 0)}


def initialize(policy: dict[str, Any]) -> None:
    sizes = ("tensor_parallel", "data_parallel", "pipeline_parallel", "virtual_pipeline", "context_parallel")
    parallel.initialize(**{name: policy.get(name, 1) for name in sizes}, seed=0)


def one_step(settings: dict[str, Any], batch: Tensors, export: str | None) -> dict[str, Any]:
    """A training step without the rollout: log-probs, three updates, log-probs of the reference."""
    policy = Policy(PolicyConfig(**settings), temperature=TEMPERATURE, total_steps=10, keep_reference=True)
    loaded = weights_of(policy)
    mask_BL = batch["response_mask_BL"]
    before = policy.log_probs(batch["tokens_BL"], mask_BL, nucleus=NUCLEUS)
    rows = training_rows(batch, before.logprobs_BL)
    updates = []
    for third in range(3):
        metrics = StepMetrics()
        policy.update(rows.select(batch["groups_B"] % 3 == third), with_loss(POSITIVE_WEIGHT), metrics)
        updates.append(policy.reduce_metrics(metrics).means())
    policy.step_schedule()
    reference_BL = policy.reference_log_probs(batch["tokens_BL"], mask_BL)
    if export is not None:
        export_hf(policy, Path(export))
    return {
        "loaded": loaded,
        "logprobs": before.logprobs_BL,
        "entropy": before.entropy_BL,
        "nucleus": before.nucleus_BL,
        "reference": reference_BL,
        "updates": updates,
        "learning_rate": policy.learning_rate,
        "weights": weights_of(policy),
    }


def gradient(settings: dict[str, Any], batch: Tensors) -> dict[str, Any]:
    """One update over the whole batch with ratios on both sides of the clip range: gradient and new weights."""
    unclipped = settings | {"megatron": settings["megatron"] | {"clip_grad": 1e9}}
    policy = Policy(PolicyConfig(**unclipped), temperature=TEMPERATURE, total_steps=10)
    widths: set[int] = set()
    policy.modules[-1].register_forward_hook(lambda _, __, output: widths.add(output.shape[-1]))
    metrics = StepMetrics()
    old_BL = policy.log_probs(batch["tokens_BL"], batch["response_mask_BL"]).logprobs_BL + batch["drift_BL"]
    policy.update(training_rows(batch, old_BL), with_loss(POSITIVE_WEIGHT), metrics)
    gather_gradients(policy)
    # already reduced over the ranks and divided by the number of tokens
    groups = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
    grads = named_full_tensors(policy.modules, WeightMap(policy.hf_config), *groups, value=attrgetter(GRADIENT))
    return {
        "output_widths": widths,
        "old_logprobs": old_BL,
        "metrics": policy.reduce_metrics(metrics).means(),
        "grads": {name: grad.clone() for name, grad in grads},
        "weights": weights_of(policy),
    }


def gather_gradients(policy: Policy) -> None:
    """The distributed optimizer leaves each rank with the reduced gradients of its own share only."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for model in policy.models:
        for bucket in (bucket for buffer in model.buffers for bucket in buffer.buckets):
            if model.ddp_config.use_distributed_optimizer:
                share = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, share, group=group)


def with_loss(positive_weight: float, *, separable: bool = True) -> Objective:
    """The clipped surrogate with a weight on positive advantages."""

    def loss(inputs: LossInputs) -> LossOutputs:
        ratio, advantages = (inputs.logprob - inputs.old_logprob).exp(), inputs.advantages
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        surrogate = torch.minimum(ratio * advantages, clipped * advantages)
        losses = -torch.where(advantages > 0, positive_weight, 1.0) * surrogate
        values = {
            "loss": losses,
            "clip_fraction_high": (advantages > 0) & (ratio > 1 + CLIP),
            "clip_fraction_low": (advantages < 0) & (ratio < 1 - CLIP),
            "policy_entropy": inputs.entropy,
        }
        count = inputs.mask.sum()
        metrics = {name: (value.detach().sum(dtype=torch.float64), count) for name, value in values.items()}
        return LossOutputs(losses=losses, count=count, metrics=metrics)

    return Objective(loss, separable=separable)


def training_rows(batch: Tensors, old_logprobs_BL: torch.Tensor) -> TrainingRows:
    mask_BL = batch["response_mask_BL"] & batch["valid_B"][:, None]
    advantages_BL = exact_advantages(batch).float()[:, None].expand(mask_BL.shape)
    return TrainingRows(batch["tokens_BL"], mask_BL, {"old_logprob": old_logprobs_BL, "advantages": advantages_BL})


def weights_of(policy: Policy) -> Tensors:
    return {name: tensor.clone() for name, tensor in policy.named_tensors()}


class LateThread:
    """A thread that does nothing before others wait for it."""

    def __init__(self, target: Callable[..., None], args: list[Any], name: str) -> None:
        self._work = partial(target, *args)

    def start(self) -> None:
        pass

    def join(self) -> None:
        self._work()


def save_checkpoint(policy: dict[str, Any], batch_file: str, directory: str, late: bool = False) -> dict[str, Any]:
    """Two updates, a checkpoint, and one more update; ``late`` writes the checkpoint after all of them."""
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
    if late:
        checkpoint.threading = SimpleNamespace(Thread=LateThread)  # type: ignore[assignment]
        saving = checkpoint.Saving(trained, Path(directory))
    else:
        checkpoint.save_policy(trained, Path(directory))
    result = {"loaded": loaded, "saved": state_of(trained), "next": next_update(trained, next(updates))}
    if late:
        saving.finish()
    return result


def load_checkpoint(policy: dict[str, Any], batch_file: str, directory: str) -> dict[str, Any]:
    """The same third update after loading that checkpoint in processes that have done something else."""
    initialize(policy)
    torch.manual_seed(4321)
    trained = Policy(PolicyConfig(**policy), temperature=TEMPERATURE, total_steps=10)
    try:
        changed = checkpoint.load_policy(trained, Path(directory))
    except RLVRError as error:
        return {"error": str(error)}
    return {
        "changed": changed,
        "saved": state_of(trained),
        "next": next_update(trained, list(update_rows(batch_file))[2]),
    }


def update_rows(batch_file: str) -> Iterator[TrainingRows]:
    batch = torch.load(batch_file)
    rows = training_rows(batch, batch["drift_BL"] - 2.0)
    return (rows.select(batch["groups_B"] % 3 == third) for third in range(3))


def state_of(policy: Policy) -> dict[str, Any]:
    with get_cuda_rng_tracker().fork():
        tracked = torch.get_rng_state()
    return {
        "weights": weights_of(policy),
        "optimizer": copy.deepcopy(
            [part.optimizer.state_dict()["state"] for part in policy.optimizer.chained_optimizers]
        ),
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
    for number, rows in enumerate(update_rows(batch_file)):
        engine.resync(trained.named_tensors(), number)
        batch = RolloutBatch.from_samples(engine.generate(prompts, sampling), pad_id(tokenizer))
        logprobs_BL = trained.log_probs(batch.tokens_BL, batch.response_mask_BL).logprobs_BL
        version = int(batch.versions_BL.max())
        reports.append({"version": version, "engine": batch.rollout_logprobs_BL, "trainer": logprobs_BL})
        trained.update(rows, with_loss(0.5), StepMetrics())
    return reports


def explosion(policy: dict[str, Any], batch_file: str) -> str:
    """What an update says whose gradient is not finite."""
    initialize(policy)
    trained = Policy(PolicyConfig(**policy), temperature=TEMPERATURE, total_steps=10)
    rows = next(update_rows(batch_file))
    rows.given["advantages"][rows.mask_BL] = torch.inf
    try:
        trained.update(rows, with_loss(0.5), StepMetrics())
    except RLVRError as error:
        return str(error)
    return "updated"


def whole_sequences(policy: dict[str, Any], batch_file: str) -> dict[str, Any]:
    """The gradient norm of an objective that sees whole sequences, and of one that does not; or why there is none."""
    initialize(policy)
    norms: dict[str, Any] = {}
    for separable in (True, False):
        trained = Policy(PolicyConfig(**policy), temperature=TEMPERATURE, total_steps=10)
        metrics, seen = StepMetrics(), []
        objective = with_loss(0.5)

        def loss(inputs: LossInputs, objective: Objective = objective, seen: list[int] = seen) -> LossOutputs:
            assert inputs.sequence is not None
            seen.append(len(inputs.sequence.unique()))
            return objective.loss(inputs)

        try:
            trained.update(next(update_rows(batch_file)), Objective(loss, separable=separable), metrics)
        except RLVRError as error:
            norms["error"] = str(error)
            continue
        norms[str(separable)] = trained.reduce_metrics(metrics).means()["grad_norm"]
        norms[f"sequences_{separable}"] = seen
    return norms


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
