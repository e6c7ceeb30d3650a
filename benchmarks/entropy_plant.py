"""Which of the paper's claims hold on the tabular plant, over seeds, as one table.

    python benchmarks/entropy_plant.py --seeds 4         # about 10 minutes on one idle core

Claims C1, C2, C4, C5 and C10 of Jin et al. (arXiv:2511.05993), tracking of Ada-Ent-Reg and PAR, where PAR saturates.
Random reward and Adam unless said. The testbed was chosen by an earlier study because the paper's orderings hold on it.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from tabular_plant import Plant, Trace, over_seeds  # noqa: E402

ARMS: dict[str, dict[str, Any]] = {
    "GRPO, N=1": {"updates": 1},
    "GRPO, N=2": {"updates": 2},
    "GRPO, N=4": {},
    "GRPO, N=8": {"updates": 8},
    "GRPO, N=4, each batch 4 times": {"reuse": 4},
    "A≥0 only": {"negative_weight": 0.0},
    "A≤0 only (λ=0)": {"recipe": "fixed", "options": {"positive_weight": 0.0}},
    "λ=0.1": {"recipe": "fixed", "options": {"positive_weight": 0.1}},
    "λ=0.5": {"recipe": "fixed", "options": {"positive_weight": 0.5}},
    "bonus −0.001": {"recipe": "bonus", "options": {"coefficient": -0.001}},
    "bonus 0.001": {"recipe": "bonus", "options": {"coefficient": 0.001}},
    "bonus 0.01": {"recipe": "bonus", "options": {"coefficient": 0.01}},
    "`par`, target 100%": {"recipe": "par", "target": "100%"},
    "`par`, target 75%": {"recipe": "par", "target": "75%"},
    "`par_pi`, target 100%": {"recipe": "par_pi", "target": "100%"},
    "`par_pi`, target 75%": {"recipe": "par_pi", "target": "75%"},
    "`ada_ent_reg`, Δ=0.002, target 100%": {"recipe": "ada_ent_reg", "target": "100%", "options": {"step": 0.002}},
    "`ada_ent_reg`, Δ=0.002, target 75%": {"recipe": "ada_ent_reg", "target": "75%", "options": {"step": 0.002}},
    "`entropic`, target 75%": {"recipe": "entropic", "target": "75%"},
    "`stare`, target 75%": {"recipe": "stare", "target": "75%"},
    "`repo_r`": {"recipe": "repo_r"},
    "learnable: GRPO": {"task": "learnable"},
    "learnable: bonus 0.003": {"task": "learnable", "recipe": "bonus", "options": {"coefficient": 0.003}},
    "learnable: bonus 0.01": {"task": "learnable", "recipe": "bonus", "options": {"coefficient": 0.01}},
    "learnable: bonus 0.03": {"task": "learnable", "recipe": "bonus", "options": {"coefficient": 0.03}},
    "learnable: `par`, target 50%": {"task": "learnable", "recipe": "par", "target": "50%"},
    "learnable: `par`, target 50%, fallback after 20": {
        **{"task": "learnable", "recipe": "par", "target": "50%", "fallback_after": 20}
    },
    "learnable: `ada_ent_reg`, Δ=0.002, target 50%": {
        **{"task": "learnable", "recipe": "ada_ent_reg", "target": "50%", "options": {"step": 0.002}}
    },
}


def row(name: str, settings: dict[str, Any], traces: list[Trace]) -> str:
    """The table's line of one arm."""
    first, last = (np.array([trace.entropy[place] for trace in traces]) for place in (0, -1))
    steps = len(traces[0].value)
    bound = [100 * np.mean([getattr(trace, side) for trace in traces]) / steps for side in SIDES]
    accuracy = np.mean([np.mean(trace.accuracy[-10:]) for trace in traces])
    target, error = settings.get("target", ""), "–"
    if target:
        share = float(target.rstrip("%")) / 100
        late = [abs(np.array(trace.entropy[steps // 2 :]) - share * trace.entropy[0]).mean() for trace in traces]
        error = f"{np.mean(late):.3f}"
    bounds = "–" if sum(bound) == 0 else f"{bound[0]:.0f} / {bound[1]:.0f}"
    spread = f"{last.mean():.3f} ({last.min():.3f}–{last.max():.3f})"
    return f"| {name} | {first.mean():.3f} | {spread} | {error} | {bounds} | {accuracy:.2f} |"


SIDES = ("saturated_low", "saturated_high")


def main() -> None:
    """Run all arms and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", default="", help="arms whose name contains this")
    parser.add_argument("--keep", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    lines = [
        f"`python benchmarks/entropy_plant.py --seeds {arguments.seeds} --steps {arguments.steps}`, "
        f"{datetime.date.today()}; mean (range) over seeds, H in nats.",
        "",
        "| arm | H first | H last | mean error, last half | % of steps at a bound: low / high | reward, last 10 |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name, settings in ARMS.items():
        if arguments.only in name:
            traces = over_seeds(Plant(steps=arguments.steps, **settings), range(arguments.seeds))
            lines.append(row(name, settings, traces))
            print(lines[-1], flush=True)
    if arguments.keep:
        arguments.keep.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
