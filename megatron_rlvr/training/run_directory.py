"""A run's directory: its configuration, its records, its checkpoints, and what may be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

from megatron_rlvr.config import LAYOUT, PIPELINE_SPLIT, Config, ConfigError, differences, load_config, save_config
from megatron_rlvr.core import RLVRError
from megatron_rlvr.report import read_records

_STEP = re.compile(r"step_(\d+)")
_MANIFEST = "manifest.json"
# Keys that may change between the parts of a resumed run: they do not change what is computed, only where and when.
_FREE = (
    *("run.dir", "run.checkpoint_every", "run.async_checkpoint", "run.checkpoints_kept"),
    *("verify.url", "verify.deadline_s", "verify.max_infra_error_share"),
    *(f"rollout.{name}" for name in ("servers", "urls", "min_servers", "router", "transport", "bucket_mib")),
    *("rollout.trainer_address", "rollout.sglang"),
    *(f"policy.{name}" for name in LAYOUT),
)
# The same of policy.megatron: Megatron-Core's ways to save memory and to overlap communication with computation.
_FREE_MEGATRON = re.compile(rf"(overlap|align|recompute|tp_comm)_\w+|bucket_size|{'|'.join(PIPELINE_SPLIT)}")


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        """Point at ``path``; nothing is read or written yet."""
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.evaluations_file = self.path / "evaluations.jsonl"
        self.notes_file = self.path / "notes.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.figures = self.path / "figures"
        self.model = self.path / "model"
        self.checkpoints = self.path / "checkpoints"

    def open(self, config: Config) -> None:
        """Create the directory with its ``config.yaml``, or check that the one there continues the same run.

        Raises:
            ConfigError: If the directory holds a run of another configuration.
            RLVRError: If it cannot be written.
        """
        if self.config_file.exists():
            saved = load_config(self.config_file)
            changed = [key for key in differences(_comparable(saved), _comparable(config)) if key not in _FREE]
            if changed:
                raise ConfigError(
                    f"{self.path} holds a run with other settings ({', '.join(changed)}); choose another run.dir, "
                    "or repeat the settings of its config.yaml to resume it"
                )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            save_config(config, self.config_file)
        except OSError as error:
            raise RLVRError(f"run.dir={self.path} cannot be written ({error}); choose another run.dir") from None

    def saved_steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        found = (_STEP.fullmatch(entry.name) for entry in self.checkpoints.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def finished(self, steps: int) -> bool:
        """Whether the run has done all its ``steps`` and exported its model, which is the last thing it does."""
        return self.saved_steps()[-1:] == [steps] and any(self.model.glob("model.safetensors*"))

    def checkpoint(self, step: int) -> Path:
        """The directory of the checkpoint after ``step`` steps."""
        return self.checkpoints / f"step_{step}"

    def start_checkpoint(self, step: int) -> Path:
        """An empty directory to write the checkpoint after ``step`` steps into; not yet seen as one."""
        directory = self.checkpoints / f"unfinished_{step}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        return directory

    def commit_checkpoint(self, step: int, kept: int) -> None:
        """Make the directory of `start_checkpoint` the checkpoint after ``step`` steps, and prune to ``kept``.

        The rename is the commit: a kill before it leaves the previous checkpoints as they were.
        """
        unfinished = self.checkpoints / f"unfinished_{step}"
        _write_manifest(unfinished)
        shutil.rmtree(self.checkpoint(step), ignore_errors=True)
        os.replace(unfinished, self.checkpoint(step))
        self.prune(kept)

    def prune(self, kept: int) -> None:
        """Remove all checkpoints but the newest ``kept``, and what kills have left of others."""
        for left in self.checkpoints.glob("unfinished_*"):
            shutil.rmtree(left)
        for old in self.saved_steps()[:-kept]:
            # A kill must not leave half of what still looks like a checkpoint.
            shutil.rmtree(self.checkpoint(old).rename(self.checkpoints / f"unfinished_{old}"))

    def verify_checkpoint(self, step: int) -> None:
        """Compare every file of a checkpoint with its manifest.

        Raises:
            RLVRError: If a file is missing or damaged; the text says what the run can be resumed from instead.
        """
        directory = self.checkpoint(step)
        try:
            manifest = json.loads((directory / _MANIFEST).read_text())
            damaged = [name for name, digest in manifest.items() if _digest(directory / name) != digest]
        except (OSError, ValueError) as error:
            damaged = [str(error)]
        if damaged:
            earlier = [saved for saved in self.saved_steps() if saved < step]
            other = f"resume from {self.checkpoint(earlier[-1])}" if earlier else "start from the first step"
            raise RLVRError(f"checkpoint {directory} is damaged ({damaged[0]}); remove that directory to {other}")

    def truncate_records(self, steps: int) -> None:
        """Drop the records of steps that will be repeated, i.e. those after the first ``steps``."""
        # A step's record carries the steps done before it, an evaluation's likewise; a fresh run evaluates first.
        evaluations = (self.evaluations_file, steps + 1 if steps else 0)
        for path, first_repeated in ((self.metrics_file, steps), (self.notes_file, steps), evaluations):
            kept = [record for record in read_records(path) if record["step"] < first_repeated]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(temporary, path)


def _comparable(config: Config) -> Config:
    """The configuration without the free keys of ``policy.megatron``."""
    fixed = {key: value for key, value in config.policy.megatron.items() if not _FREE_MEGATRON.fullmatch(key)}
    return replace(config, policy=replace(config.policy, megatron=fixed))


def _write_manifest(directory: Path) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    digests = {str(path.relative_to(directory)): _digest(path) for path in files}
    (directory / _MANIFEST).write_text(json.dumps(digests, indent=1))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
