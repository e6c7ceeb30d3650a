"""Saving and resuming a whole run: the policy's distributed checkpoint plus the state of everything else."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_rlvr.core import RolloutBatch, StepMetrics
from megatron_rlvr.policy.checkpoint import Saving, load_policy
from megatron_rlvr.training.collection import Collected

if TYPE_CHECKING:
    from megatron_rlvr.training.trainer import Trainer

_RUN_STATE = "run_state.json"
_AHEAD = "ahead.pt"  # batches that were collected and not trained on


class Checkpointer:
    """Saves the run it belongs to; all ranks call the same methods in the same order."""

    def __init__(self, trainer: Trainer) -> None:
        """Nothing is saved yet.

        Args:
            trainer: The run; its group for Python objects says when all ranks have written their parts.
        """
        self._trainer = trainer
        self._pending: tuple[int, Saving] | None = None

    def save(self, *, wait: bool) -> None:
        """Checkpoint the run after ``trainer.step`` steps. A kill loses no checkpoint that is complete.

        Args:
            wait: Return when it is complete; otherwise that takes a later `poll`.
        """
        self._commit()
        trainer = self._trainer
        directory = trainer.directory
        unfinished = directory.checkpoints / f"unfinished_{trainer.step}"
        if trainer.rank == 0:
            unfinished = directory.start_checkpoint(trainer.step)
            position, finished = trainer.collector.state_dict()
            torch.save([asdict(batch) for batch in finished], unfinished / _AHEAD)
            state = {
                "step": trainer.step,
                "control": trainer.control.state_dict(),
                "attribution": trainer.attribution.state_dict(),
                "policy_entropy": trainer.policy_entropy,
                "prompts": position,
                "ahead": len(finished),
            }
            (unfinished / _RUN_STATE).write_text(json.dumps(state))
        dist.barrier()
        self._pending = trainer.step, Saving(trainer.policy, unfinished)
        if wait:
            self._commit()

    def poll(self) -> None:
        """Complete the checkpoint that is being written, if every rank has written its part."""
        if self._pending is None:
            return
        written = torch.tensor(int(self._pending[1].written))
        dist.all_reduce(written, dist.ReduceOp.MIN, group=self._trainer.object_group)
        if written:
            self._commit()

    def _commit(self) -> None:
        if self._pending is None:
            return
        step, saving = self._pending
        self._pending = None
        saving.finish()
        dist.barrier()
        if self._trainer.rank == 0:
            self._trainer.directory.commit_checkpoint(step, self._trainer.config.run.checkpoints_kept)
        dist.barrier()


def resume(trainer: Trainer) -> tuple[int, str | None]:
    """Restore the newest checkpoint of the run into ``trainer``; a collective call.

    Returns:
        The number of steps done, 0 for a fresh run, and what another layout changes, in words.

    Raises:
        RLVRError: If that checkpoint is damaged or was made with the other kind of optimizer.
    """
    steps = trainer.directory.saved_steps()
    if not steps:
        return 0, None
    trainer.on_rank_0(lambda: trainer.directory.verify_checkpoint(steps[-1]))
    trainer.on_rank_0(lambda: trainer.directory.prune(trainer.config.run.checkpoints_kept))
    directory = trainer.directory.checkpoint(steps[-1])
    relaid = load_policy(trainer.policy, directory)
    state = json.loads((directory / _RUN_STATE).read_text())
    trainer.control.load_state_dict(state["control"])
    trainer.attribution.load_state_dict(state["attribution"])
    trainer.policy_entropy = state["policy_entropy"]
    ahead: list[Collected | None] = [None] * state["ahead"]
    if trainer.rank == 0:
        ahead = [_collected(saved) for saved in torch.load(directory / _AHEAD, weights_only=True)]
    trainer.collector.load_state_dict(state["prompts"], ahead)
    return int(state["step"]), relaid


def _collected(saved: dict[str, Any]) -> Collected:
    batch, metrics = RolloutBatch(**saved["batch"]), StepMetrics(**saved["metrics"])
    return Collected(**saved | {"batch": batch, "metrics": metrics})
