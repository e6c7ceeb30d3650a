"""Saving and resuming a whole run: the policy's distributed checkpoint plus the state of everything else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_rlvr.policy.checkpoint import load_policy, save_policy

if TYPE_CHECKING:
    from megatron_rlvr.training.trainer import Trainer

_RUN_STATE = "run_state.json"


def save(trainer: Trainer) -> None:
    """Checkpoint the run after ``trainer.step`` steps; a collective call. A kill during it loses no older one."""
    directory = trainer.directory
    unfinished = directory.checkpoints / f"unfinished_{trainer.step}"
    if trainer.rank == 0:
        unfinished = directory.start_checkpoint(trainer.step)
        state = {
            "step": trainer.step,
            "controller": trainer.controller.state_dict(),
            "sampler": trainer.sampler.state_dict(),
        }
        (unfinished / _RUN_STATE).write_text(json.dumps(state))
    dist.barrier()
    save_policy(trainer.policy, unfinished)
    dist.barrier()
    if trainer.rank == 0:
        directory.commit_checkpoint(trainer.step, trainer.config.run.checkpoints_kept)
    dist.barrier()


def resume(trainer: Trainer) -> int:
    """Restore the newest checkpoint of the run into ``trainer``; a collective call.

    Returns:
        The number of steps done, 0 for a fresh run.

    Raises:
        RLVRError: If that checkpoint is damaged or was made by another layout.
    """
    steps = trainer.directory.saved_steps()
    if not steps:
        return 0
    trainer.on_rank_0(lambda: trainer.directory.verify_checkpoint(steps[-1]))
    directory = trainer.directory.checkpoint(steps[-1])
    load_policy(trainer.policy, directory)
    state = json.loads((directory / _RUN_STATE).read_text())
    trainer.controller.load_state_dict(state["controller"])
    trainer.sampler.load_state_dict(state["sampler"])
    return int(state["step"])
