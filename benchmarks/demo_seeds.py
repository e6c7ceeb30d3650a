"""Plain GRPO against entropy-guided PAR on the demo's task, over several seeds, as one table.

    python benchmarks/demo_seeds.py --seeds 0 1 2          # about 3 minutes per run on two idle cores

Every run is the command that `make demo` types with another ``run.seed``; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron_rlvr.report.report import RunRecords, load_run, write_report

ROOT = Path(__file__).parent.parent
RECIPES = {"grpo": "none", "par": "par"}
COLUMNS = ("H first 10", "H last 10", "reward last 10", "λ mean", "held-out avg@16", "pass@16", "distinct", "s/step")


def train(name: str, seed: int, overrides: list[str]) -> Path:
    """One run, or the finished one that is there already."""
    run = ROOT / "runs" / "seeds" / f"{name}-{seed}"
    keys = [f"run.dir={run}", f"run.seed={seed}", f"entropy.recipe={RECIPES[name]}", *overrides]
    command = [sys.executable, "-m", "megatron_rlvr", "train", "examples/countdown/demo.yaml", *keys]
    subprocess.run(command, cwd=ROOT, check=True)
    return run


def row(run: RunRecords) -> list[float]:
    """The table's numbers of one run."""
    last = run.evaluations[-1]
    return [
        run.mean("entropy", first=True),
        run.mean("entropy", first=False),
        run.mean("reward_mean", first=False),
        float(np.mean([step["positive_weight"] for step in run.steps])),
        last["avg_at_k"],
        last["pass_at_k"]["16"],
        last["distinct_correct"],
        float(np.median([step["seconds/total"] for step in run.steps])),
    ]


def table(runs: dict[str, list[RunRecords]]) -> str:
    """All runs and each recipe's mean as Markdown."""
    base = next(iter(runs.values()))[0].evaluations[0]
    lines = [f"| run | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    before = ["–"] * 4 + [f"{base[key]:.3f}" for key in ("avg_at_k",)]
    before += [f"{base['pass_at_k']['16']:.3f}", f"{base['distinct_correct']:.2f}", "–"]
    lines.append(f"| base model | {' | '.join(before)} |")
    for name, records in runs.items():
        numbers = [row(run) for run in records]
        for run, values in zip(records, numbers, strict=True):
            lines.append(f"| {run.name} | {' | '.join(f'{value:.3f}' for value in values)} |")
        lines.append(f"| **{name}, mean** | {' | '.join(f'{value:.3f}' for value in np.mean(numbers, 0))} |")
    return "\n".join(lines)


def main() -> None:
    """Run everything and print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="file that receives the table as well")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    runs = {name: [load_run(train(name, seed, options.overrides)) for seed in options.seeds] for name in RECIPES}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    where = f"{platform.machine()}, 2 trainer ranks over gloo, {datetime.date.today()}, commit {commit.strip()}"
    text = f"{table(runs)}\n\n`python benchmarks/demo_seeds.py {' '.join(sys.argv[1:])}` on {where}\n"
    print(text)
    if options.keep:
        options.keep.parent.mkdir(parents=True, exist_ok=True)
        options.keep.write_text(text)
    seeds = ROOT / "runs" / "seeds"
    write_report([seeds / f"{name}-{seed}" for seed in options.seeds for name in RECIPES], seeds)


if __name__ == "__main__":
    main()
