"""The demo's PAR run with its batches collected in other ways: on SGLang servers, early, refilled, over-provisioned.

    python benchmarks/demo_rollouts.py --keep FILE      # about 3 minutes per run on two cores; needs `make sglang`

One seed each, so differences below those between seeds (`benchmarks/results/demo_seeds.md`) say nothing. On two cores
rollouts and updates compete for the same cores: nothing is faster here for running side by side. Finished runs are not
repeated.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron_rlvr.report.report import RunRecords, load_run

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "rollouts"
SGLANG = ("rollout.engine=sglang",)
VARIANTS: dict[str, tuple[str, ...]] = {
    "embedded": (),
    "embedded, refills 2": ("rollout.refills=2",),
    "embedded, staleness 1, TIS": ("rollout.max_staleness=1", "objective.mismatch=tis"),
    "embedded, staleness 4, TIS": ("rollout.max_staleness=4", "objective.mismatch=tis"),
    "SGLang": SGLANG,
    "SGLang, staleness 1, partial, TIS": (
        *SGLANG,
        *("rollout.max_staleness=1", "rollout.partial=true", "objective.mismatch=tis"),
    ),
    "SGLang, over-provision 1.25, refills 2": (*SGLANG, "rollout.over_provision=1.25", "rollout.refills=2"),
}
COLUMNS = (
    *("H first 10", "H last 10", "held-out avg@16", "mean staleness", "rows with an advantage"),
    *("largest gap, step 0, nats", "prompts drawn per step", "s/step"),
)


def train(name: str) -> RunRecords:
    """One run, or the finished one that is there already."""
    run = RUNS / name.replace(", ", "_").replace(" ", "-")
    command = [sys.executable, "-m", "megatron_rlvr", "train", "examples/countdown/demo.yaml", f"run.dir={run}"]
    subprocess.run([*command, *VARIANTS[name]], cwd=ROOT, check=True)
    return load_run(run)


def row(run: RunRecords) -> list[str]:
    """The table's cells of one run."""

    def over_steps(key: str) -> list[float]:
        return [step[key] for step in run.steps]

    return [
        f"{run.mean('entropy', first=True):.3f}",
        f"{run.mean('entropy', first=False):.3f}",
        f"{run.evaluations[-1]['avg_at_k']:.3f}",
        f"{np.mean(over_steps('staleness')):.2f}",
        f"{np.mean(over_steps('informative_share')):.2f}",
        f"{run.steps[0]['rollout_trainer_gap_max']:.1e}",
        f"{np.mean(over_steps('drawn_prompts')):.1f}",
        f"{np.median(over_steps('seconds/total')):.2f}",
    ]


def main() -> None:
    """Run everything and print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="file that receives the table as well")
    options = parser.parse_args()
    lines = [f"| collected by | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row(train(name)))} |" for name in VARIANTS]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    where = f"{platform.machine()}, 2 trainer ranks over gloo, {datetime.date.today()}, commit {commit.strip()}"
    text = "\n".join(lines) + f"\n\n`python benchmarks/demo_rollouts.py`, the demo's PAR run, seed 0, on {where}\n"
    print(text)
    if options.keep:
        options.keep.write_text(text)


if __name__ == "__main__":
    main()
