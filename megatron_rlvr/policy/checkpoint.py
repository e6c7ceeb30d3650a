"""The policy's part of a checkpoint, in Megatron's distributed format."""

from __future__ import annotations

import inspect
import queue
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_rlvr.config import LAYOUT, PIPELINE_SPLIT
from megatron_rlvr.core import RLVRError
from megatron_rlvr.policy.policy import Policy

_DISTRIBUTED = "megatron.use_distributed_optimizer"
# How a distributed optimizer's share is written: under the parameters' names, so that another layout can read it.
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}
# Newer versions of Megatron-Core would leave the writing to another package.
_ASKED = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
_OWN_WRITER = {"async_strategy": "mcore"} if _ASKED else {}


class Saving:
    """A checkpoint that a thread of every rank writes from copies of its state; `finish` makes it one."""

    def __init__(self, policy: Policy, directory: Path) -> None:
        """Copy weights, optimizer, schedule and this rank's RNG, and begin to write them; a collective call.

        Args:
            policy: May go on training.
            directory: Exists and is empty but for the caller's files.
        """
        if dist.get_rank() == 0:
            (directory / "policy").mkdir()
        dist.barrier()
        torch.save(_rng_state(), directory / _rng_file())
        # The results never leave this process. Megatron's default is a queue in a manager process, which takes seconds
        # to start and stays behind for good when this rank is killed.
        filesystem_async._results_queue = queue.Queue()
        state = _sharded_state(policy, is_loading=False)
        request = dist_checkpointing.save(state, str(directory / "policy"), async_sharded_save=True, **_OWN_WRITER)
        self._finalize = request.finalize_fns
        write = request.async_fn or _nothing  # a rank may have nothing that no other one has
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = _copied(request.preload_fn(), of=arguments[1])
        self._thread = threading.Thread(target=write, args=arguments, name=f"save {directory}")
        self._thread.start()

    @property
    def written(self) -> bool:
        """Whether this rank has written its part, or failed to; `finish` does not wait then."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for all ranks and write the index of their parts; a collective call.

        Raises:
            torch.distributed.checkpoint.api.CheckpointException: If a rank could not write its part.
        """
        self._thread.join()
        dist.barrier()
        for finalize in self._finalize:
            finalize()


def _nothing() -> None:
    pass


def _copied(buckets: Any, of: Any) -> list[Any]:
    """Megatron's write buckets, with copies of those tensors that are still the trained ones, as CPU tensors are."""
    copied = []
    for (file, key, (others, tensors)), (_, _, (_, trained)) in zip(buckets, of, strict=True):
        pairs = zip(tensors, trained, strict=True)
        own = [(item, new.clone() if new.data_ptr() == old.data_ptr() else new) for (item, new), (_, old) in pairs]
        copied.append((file, key, (others, own)))
    return copied


def save_policy(policy: Policy, directory: Path) -> None:
    """Write weights, optimizer, schedule and this rank's RNG into the existing ``directory``; a collective call."""
    Saving(policy, directory).finish()


def load_policy(policy: Policy, directory: Path) -> str | None:
    """Restore what `save_policy` wrote, in whatever layout; a collective call.

    Returns:
        What has changed, in words, if another layout wrote it: weights, optimizer and schedule are then the same, but
        every rank keeps its freshly seeded RNG, and rounding takes another course.

    Raises:
        RLVRError: If the optimizer's state is not in the form that ``policy.megatron.use_distributed_optimizer`` reads.
    """
    saved = dist_checkpointing.load_common_state_dict(str(directory / "policy"))["layout"]
    ours = _layout(policy)
    changed = [f"policy.{key}={saved[key]} became {ours[key]}" for key in ours if saved[key] != ours[key]]
    if saved[_DISTRIBUTED] != ours[_DISTRIBUTED]:
        raise RLVRError(
            f"{directory} was saved with policy.{_DISTRIBUTED}={str(saved[_DISTRIBUTED]).lower()}, whose optimizer "
            "state has another form; resume with the same (every parallel size may change)"
        )
    state = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(directory / "policy"))
    for module, weights in zip(policy.modules, state["model"], strict=True):
        module.load_state_dict(weights)
    policy.optimizer.load_state_dict(state["optimizer"])
    policy.schedule.load_state_dict(state["schedule"])
    if changed:
        return (
            f"{', '.join(changed)}: weights, optimizer and schedule continue, each rank's random state begins anew, "
            "and from here on the run equals an uninterrupted one up to rounding instead of bit for bit"
        )
    rng = torch.load(directory / _rng_file(), weights_only=True)
    torch.set_rng_state(rng["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    get_cuda_rng_tracker().set_states(rng["megatron"])
    return None


def _sharded_state(policy: Policy, *, is_loading: bool) -> dict[str, Any]:
    policy.settle()
    model = [module.sharded_state_dict() for module in policy.modules]  # type: ignore[operator]
    return {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_RESHARDABLE),
        "schedule": policy.schedule.state_dict(),
        "layout": _layout(policy),
    }


def _layout(policy: Policy) -> dict[str, Any]:
    """What decides which rank computes what, by key of the configuration's section ``policy``."""
    config = policy.config
    passed = {f"megatron.{name}": config.megatron.get(name) for name in PIPELINE_SPLIT}
    distributed = bool(config.megatron.get("use_distributed_optimizer", False))
    return {**{name: getattr(config, name) for name in LAYOUT}, **passed, _DISTRIBUTED: distributed}


def _rng_file() -> str:
    return f"rng_{dist.get_rank()}.pt"


def _rng_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }
