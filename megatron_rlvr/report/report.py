"""Figures, a one-page HTML report and a few lines of text, computed from the records of finished or running runs."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from megatron_rlvr.core import RLVRError
from megatron_rlvr.report.records import read_records

mpl.use("Agg")
import matplotlib.pyplot as plt

_WINDOW = 10  # steps averaged in the summary and in the bold curves
_PANELS = (
    ("entropy", "entropy H (nats per token)"),
    ("positive_weight", "positive weight λ"),
    ("reward_mean", "reward (share accepted)"),
)


@dataclass(frozen=True, slots=True)
class RunRecords:
    """What a run has recorded.

    Attributes:
        name: The run directory's name.
        steps: One object per step, ascending.
        evaluations: One object per evaluation on held-out prompts, ascending.
        notes: What the run had to say, ascending: a controller at its bound, an engine that disagrees.
    """

    name: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    notes: list[dict[str, Any]]

    def mean(self, metric: str, *, first: bool) -> float:
        """Mean of ``metric`` over the first or last ten steps."""
        chosen = self.steps[:_WINDOW] if first else self.steps[-_WINDOW:]
        return float(np.mean([step[metric] for step in chosen]))

    def summary(self) -> str:
        """One line: entropy, positive weight, reward and held-out accuracy from the start to the end."""
        line = (
            f"{self.name}: entropy {self.mean('entropy', first=True):.3f} → {self.mean('entropy', first=False):.3f}, "
            f"λ at the end {self.mean('positive_weight', first=False):.2f}, "
            f"reward {self.mean('reward_mean', first=True):.3f} → {self.mean('reward_mean', first=False):.3f}"
        )
        if len(self.evaluations) > 1:
            first, last = self.evaluations[0], self.evaluations[-1]
            line += f", held-out accuracy {first['avg_at_k']:.3f} → {last['avg_at_k']:.3f}"
        return line


def load_run(directory: str | Path) -> RunRecords:
    """Read a run directory.

    Raises:
        RLVRError: If it has no recorded step.
    """
    path = Path(directory)
    steps = read_records(path / "metrics.jsonl")
    if not steps:
        raise RLVRError(f"{path} has no recorded steps in metrics.jsonl; name a run directory that has trained")
    evaluations, notes = (read_records(path / f"{name}.jsonl") for name in ("evaluations", "notes"))
    return RunRecords(path.name, steps, evaluations, notes)


def write_report(directories: Sequence[str | Path], output: str | Path | None = None) -> str:
    """Write ``figures/curves.png`` and ``report.html`` and say what the curves show.

    Args:
        directories: Run directories, the baseline first.
        output: Where to write; by default the first run's directory.

    Returns:
        The summary: one line per run, for several runs one that compares their entropies, and the files written.

    Raises:
        RLVRError: If a directory has no recorded step.
    """
    runs = [load_run(directory) for directory in directories]
    target = Path(output or directories[0])
    (target / "figures").mkdir(parents=True, exist_ok=True)
    figure = target / "figures" / "curves.png"
    _draw(runs, figure)
    lines = [run.summary() for run in runs]
    lines += [f"{run.name}, step {note['step']}, {note['about']}: {note['text']}" for run in runs for note in run.notes]
    if len(runs) > 1:
        ends = [run.mean("entropy", first=False) for run in runs]
        others = ", ".join(f"{run.name} {end / ends[0]:.2f}×" for run, end in zip(runs[1:], ends[1:], strict=True))
        lines.append(f"entropy at the end against {runs[0].name}: {others}")
    (target / "report.html").write_text(_page(runs, lines, figure))
    return "\n".join([*lines, f"figure: {figure}   report: {target / 'report.html'}"])


def _draw(runs: Sequence[RunRecords], path: Path) -> None:
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(5 * len(_PANELS), 3.6), layout="constrained")
    for axis, (metric, label) in zip(axes, _PANELS, strict=True):
        for index, run in enumerate(runs):
            values = np.array([step[metric] for step in run.steps])
            steps = np.array([step["step"] for step in run.steps])
            axis.plot(steps, values, color=f"C{index}", alpha=0.25, linewidth=1)
            axis.plot(steps, _smooth(values), color=f"C{index}", linewidth=2, label=run.name)
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over up to ten steps, the current one last."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - _WINDOW)
    smoothed: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return smoothed


def _page(runs: Sequence[RunRecords], lines: Sequence[str], figure: Path) -> str:
    image = base64.b64encode(figure.read_bytes()).decode()
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{html.escape(str(cell))}</td>"
            for cell in (
                run.name,
                evaluation["step"],
                f"{evaluation['avg_at_k']:.3f}",
                *(f"{value:.3f}" for value in evaluation["pass_at_k"].values()),
                f"{evaluation['distinct_correct']:.2f}",
            )
        )
        + "</tr>"
        for run in runs
        for evaluation in run.evaluations
    )
    ks: dict[str, float] = next((run.evaluations[0]["pass_at_k"] for run in runs if run.evaluations), {})
    head = "".join(f"<th>{cell}</th>" for cell in ("run", "step", "avg@k", *(f"pass@{k}" for k in ks), "distinct"))
    summary = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    return (
        "<!doctype html><meta charset=utf-8><title>megatron-rlvr report</title>"
        "<style>body{font:15px sans-serif;max-width:75em;margin:2em auto}img{width:100%}"
        "td,th{padding:.2em .8em;text-align:right}</style>"
        f"<h1>{html.escape(', '.join(run.name for run in runs))}</h1>{summary}"
        f'<img alt="entropy, positive weight and reward by step" src="data:image/png;base64,{image}">'
        f"<h2>Held-out prompts</h2><table><tr>{head}</tr>{rows}</table>"
    )
