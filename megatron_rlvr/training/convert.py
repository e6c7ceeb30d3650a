"""Finds the checkpoint that ``megatron-rlvr convert`` is asked for and has the policy's room convert it."""

from __future__ import annotations

import warnings
from pathlib import Path

from megatron_rlvr.config import load_config
from megatron_rlvr.core import RLVRError
from megatron_rlvr.policy import cpu_runtime
from megatron_rlvr.training.run_directory import RunDirectory


def convert(source: str | Path, output: str | Path) -> Path:
    """Write a run's checkpoint as a Hugging Face model directory.

    Args:
        source: A run directory, for its newest checkpoint, or one of its ``checkpoints/step_N``.
        output: Directory to write; must not exist or be empty.

    Returns:
        ``output``.

    Raises:
        RLVRError: If there is no checkpoint, it is damaged, or ``output`` is in use.
    """
    run, step = _locate(Path(source))
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RLVRError(f"{output} is not an empty directory; convert into a new one")
    run.verify_checkpoint(step)
    warnings.filterwarnings("ignore", module="megatron")
    cpu_runtime.install()  # before anything else imports Megatron-Core
    from megatron_rlvr.policy.convert import convert_checkpoint

    convert_checkpoint(load_config(run.config_file).policy, run.checkpoint(step), output)
    return output


def _locate(source: Path) -> tuple[RunDirectory, int]:
    """The run, and the number of steps of the checkpoint meant."""
    source = source.resolve()
    is_run = (source / "config.yaml").exists()
    run = RunDirectory(source if is_run else source.parents[1] if len(source.parents) > 1 else source)
    steps = [step for step in run.saved_steps() if is_run or run.checkpoint(step) == source]
    if not run.config_file.exists() or not steps:
        raise RLVRError(f"{source} holds no checkpoint of a run; give the run.dir of a run, or its checkpoints/step_N")
    return run, steps[-1]
