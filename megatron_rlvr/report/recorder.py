"""What a running trainer shows and keeps: metrics.jsonl, TensorBoard, and one line that matters."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_rlvr.report.records import append_record


class RunRecorder:
    """Writes every step's metrics to the run directory and shows the progress; lives on rank 0 only."""

    def __init__(self, directory: Path, *, total_steps: int, first_step: int) -> None:
        """Open the records of the run in ``directory``.

        Args:
            directory: The run directory.
            total_steps: Steps of the whole run.
            first_step: Steps already done; TensorBoard drops what an earlier, killed part wrote after them.
        """
        self._metrics = directory / "metrics.jsonl"
        self._evaluations = directory / "evaluations.jsonl"
        self._notes = directory / "notes.jsonl"
        self._standing: dict[str, str | None] = {}
        self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)
        # A log file gets one line every half minute, a terminal a bar that moves.
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=directory.name,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )

    def __enter__(self) -> RunRecorder:
        """The recorder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flush and close."""
        self._bar.close()
        self._tensorboard.close()

    def record_step(self, record: Mapping[str, Any]) -> None:
        """Keep one step's metrics; ``record["step"]`` counts from 0."""
        append_record(self._metrics, record)
        for name, value in record.items():
            if name != "step":
                self._tensorboard.add_scalar(name, value, record["step"])
        self._bar.set_postfix_str(
            f"H={record['entropy']:.3f} λ={record['positive_weight']:.2f} reward={record['reward_mean']:.3f} "
            f"{record['tokens_per_s']:.0f} tok/s",
            refresh=False,
        )
        self._bar.update()

    def note(self, step: int, about: str, text: str | None) -> None:
        """Say ``text`` when it begins to hold and keep it for the report; None when there is nothing to say (any more).

        A sentence about the same thing in the next step, whatever its numbers, goes unsaid.
        """
        if text is not None and self._standing.get(about) is None:
            append_record(self._notes, {"step": step, "about": about, "text": text})
            tqdm.write(f"step {step}, {about}: {text}", file=sys.stderr)
        self._standing[about] = text

    def record_evaluation(self, record: Mapping[str, Any]) -> None:
        """Keep one evaluation on the held-out prompts; ``record["step"]`` is the number of steps done before it."""
        append_record(self._evaluations, record)
        for name in ("avg_at_k", "distinct_correct"):
            self._tensorboard.add_scalar(f"heldout/{name}", record[name], record["step"])
