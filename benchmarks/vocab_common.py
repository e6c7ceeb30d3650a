"""What the vocabulary benchmarks share: a Megatron tensor-parallel group over gloo, Markdown, and who could not run."""

from __future__ import annotations

import multiprocessing
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def group_of(rank: int, ranks: int, meeting: str) -> dist.ProcessGroup:
    """Join a tensor-parallel group of all ranks, one thread each; Megatron-Core and what builds on it know it too."""
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def launch(worker: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """Run ``worker(rank, meeting, *arguments)`` in as many fresh processes, and stop where one of them fails."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        everyone = [(rank, f"{folder}/meeting", *arguments) for rank in range(ranks)]
        processes = [context.Process(target=worker, args=mine, daemon=True) for mine in everyone]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a rank failed; its error is above")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def note_missing(missing: dict[str, str]) -> str:
    """A list of what was not run."""
    return "Not run:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in missing.items())


def footer(command: str, how: str) -> str:
    """Where the figures come from."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True).stdout
    made = f"torch {torch.__version__}, {platform.machine()}, {date.today()}, commit {commit.strip()}"
    return f"`python benchmarks/{command}`, {how}, {made}"
