"""One training step in every parallel layout against the same step on one rank.

    python benchmarks/layouts.py --keep benchmarks/results/layouts.md  # 2 minutes on two cores

A random Qwen3 with 4 layers; batch and step are those of tests/policy/test_policy_layouts.py: log-probs, three
updates with gradient clipping, and one update over the whole batch whose gradient is looked at.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "policy")]

from policy_models import random_batch, write_odd_model  # noqa: E402
from policy_ranks import run_ranks  # noqa: E402
from vocab_common import footer, markdown  # noqa: E402

DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 1": {},
    "TP 2": {"tensor_parallel": 2},
    "TP 2 + sequence parallel": {"tensor_parallel": 2, "sequence_parallel": True},
    "PP 2": {"pipeline_parallel": 2},
    "PP 2, VPP 2 (interleaved)": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "CP 2": {"context_parallel": 2},
    "DP 2": {"data_parallel": 2},
    "DP 2 + distributed optimizer": {"data_parallel": 2, "megatron": DISTRIBUTED},
    "DP 2 + distributed optimizer, overlapped": {"data_parallel": 2, "megatron": DISTRIBUTED | OVERLAP},
    "DP 2, rows packed by tokens": {"data_parallel": 2, "micro_batch_tokens": 20},
    "TP 2 + sequence parallel, PP 2": {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2},
    "TP 2, CP 2, rows packed by tokens": {"tensor_parallel": 2, "context_parallel": 2, "micro_batch_tokens": 20},
}
_RANKS = ("tensor_parallel", "pipeline_parallel", "context_parallel", "data_parallel")
ROWS = 4  # of a micro-batch

Tensors = dict[str, torch.Tensor]


def main() -> None:
    """Measure, print, and keep the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="write the page to this file, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(random_batch(37), Path(folder) / "batch.pt")
        model = write_odd_model(Path(folder) / "model", num_hidden_layers=4)
        results = {name: step(settings, model, Path(folder) / "batch.pt") for name, settings in LAYOUTS.items()}
    reference = results["TP 1"]
    alone = reference["gradient"]["metrics"]
    head = ["layout", "loss", "gradient norm", "other metrics", "log-probs", "gradient", "weights"]
    lines = [[name, *differences(result, reference)] for name, result in results.items() if name != "TP 1"]
    page = "\n\n".join(
        (
            "# One training step in every layout",
            "Largest relative difference to one rank, fp32 on the CPU (Megatron-Core"
            f" {reference['version']}). Loss {alone['loss']:.6f}, gradient norm {alone['grad_norm']:.6f} there."
            " Log-probs: absolute, in nats. Gradient and weights (after three updates): of every tensor, over its"
            " largest element. 1.2e-07 is the distance from 1 to the next fp32 number.",
            markdown(head, lines),
            footer("layouts.py", "one thread per rank"),
        )
    )
    print(page)
    if options.keep:
        options.keep.write_text(page + "\n")


def step(settings: dict[str, Any], model: Path, batch_file: Path) -> dict[str, Any]:
    """What rank 0 reports of the step."""
    ours = {
        "adam_eps": 1e-3,
        "clip_grad": 0.5,
    }  # the usual epsilon makes whole steps of the rounding of gradients near 0
    policy = {"model": str(model), "learning_rate": 1e-3, **settings, "megatron": ours | settings.get("megatron", {})}
    ranks = math.prod(settings.get(name, 1) for name in _RANKS)
    result: dict[str, Any] = run_ranks(
        "layout", ranks, policy=policy, batch_file=str(batch_file), micro_batches=[ROWS], export=None
    )[0]
    return result


def differences(result: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """The cells of a layout's line."""
    got, wanted = result["gradient"], reference["gradient"]
    metrics = {name: abs(got["metrics"][name] / value - 1) for name, value in wanted["metrics"].items()}
    step, reference_step = result["steps"][ROWS], reference["steps"][ROWS]
    gaps = (
        metrics.pop("loss"),
        metrics.pop("grad_norm"),
        max(metrics.values()),
        float((step["logprobs"] - reference_step["logprobs"]).abs().max()),
        largest(got["grads"], wanted["grads"]),
        largest(step["weights"], reference_step["weights"]),
    )
    return [f"{gap:.0e}" if gap else "0" for gap in gaps]


def largest(got: Tensors, wanted: Tensors) -> float:
    """The largest difference, relative to the largest element of its tensor."""
    assert got.keys() == wanted.keys()
    return max(float((got[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)


if __name__ == "__main__":
    main()
