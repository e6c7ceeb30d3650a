"""What log-probability and entropy cost with their gradients: collectives, peak memory and seconds, beside peers.

    python benchmarks/vocab_cost.py logits --peers DIR --keep benchmarks/results/vocab_cost_logits.md
    python benchmarks/vocab_cost.py hidden --peers DIR --keep benchmarks/results/vocab_cost_hidden.md

Each takes about three minutes on two idle cores. ``--peers`` names the directory that `vocab_peers.py` says how to
fill. A method runs forward and backward with random upstream gradients of log-probability and (where it can) entropy.

Memory is the peak above the inputs, gradients included, in U: one U is a rank's logits in fp32, T * V / tp * 4 bytes.
It is measured twice in one run, from the events of torch's CPU allocator and, as a check in brackets, as the kernel's
high-water mark of the process. Seconds are CPU-seconds of one thread (the slowest rank's, the lesser of two interleaved
runs) beside the wall clock, which other work on the machine disturbs. Megatron-Core and some peers compile parts of
themselves; the run that does it is not measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))  # what is freed goes back, or no high-water mark is true

import torch
import torch.distributed as dist
import vocab_methods
from torch.profiler import ProfilerActivity, profile
from vocab_common import footer, group_of, launch, markdown, note_missing
from vocab_methods import Method
from vocab_peers import NOT_RUN, load

TOKENS, VOCAB, HIDDEN = 1024, 32000, 512
REPEATS = 2
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "broadcast",
    "reduce", "all_to_all", "all_to_all_single", "gather", "scatter", "send", "recv",
)  # fmt: skip


NOTES = {
    "logits": "Megatron-Core's cross entropies know no entropy, and save memory by overwriting fp32 logits. verl and"
    " SkyRL are meant for fp32 logits.",
    "hidden": "torch's F.linear_cross_entropy, SkyRL's fused head and CCE know no entropy; CCE is compiled C++. SkyRL"
    " leaves the sum of dX over the ranks to its caller.",
}


class Cost(NamedTuple):
    """One method's figures: collectives forward and backward, both peaks in U, CPU and wall seconds."""

    forward: int
    backward: int
    memory: float
    resident: float
    cpu: float
    wall: float


class Ledger:
    """Counts the calls of ``torch.distributed`` while it is open."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._real: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Ledger:
        for name in COLLECTIVES:
            self._real[name] = getattr(dist, name)
            setattr(dist, name, self._counting(self._real[name]))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._real.items():
            setattr(dist, name, function)

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(vocab_methods.PHASE[0])
            return function(*args, **kwargs)

        return counted


def peaks(run: Callable[[], object]) -> tuple[float, float]:
    """Bytes that ``run`` holds at its peak beyond what was held before, by the allocator and by the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        resident = _status("VmHWM") - before
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = allocated = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        allocated = max(allocated, held)
    return float(allocated), float(resident)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


class Bench:
    """Inputs of one rank and how a method is measured on them."""

    def __init__(self, form: str, dtype: torch.dtype, group: Any) -> None:
        """Make inputs of the given form and dtype, the same on every rank but for the shard."""
        self.group, ranks = group, dist.get_world_size(group)
        width = VOCAB // ranks
        generator = torch.Generator().manual_seed(0)
        self.targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
        self.upstream = (torch.randn(TOKENS, generator=generator), torch.randn(TOKENS, generator=generator))
        hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
        weight = torch.randn(width, HIDDEN, generator=generator.manual_seed(dist.get_rank(group))) / HIDDEN**0.5 * 3
        inputs = [hidden, weight] if form == "hidden" else [hidden @ weight.T]
        self.inputs = [tensor.to(dtype) for tensor in inputs]
        self.unit = TOKENS * width * 4

    def run(self, method: Method, inputs: list[torch.Tensor] | None = None) -> object:
        """Once, on fresh copies of the inputs unless they are given."""
        group = self.group if method.sharded else None
        return method.run(inputs or self.copies(), self.targets, self.upstream, group)

    def copies(self) -> list[torch.Tensor]:
        """Inputs that a method may overwrite."""
        return [tensor.clone() for tensor in self.inputs]

    def measure(self, methods: list[Method]) -> dict[str, Cost]:
        """Costs of all methods, the same on every rank."""
        costs: dict[str, list[float]] = {}
        for method in methods:
            if method.compiled:
                self.run(method)
            copies = self.copies()
            with Ledger() as ledger:
                sizes = peaks(lambda method=method, copies=copies: self.run(method, copies))  # type: ignore[misc]
            phases = [ledger.calls.count(phase) for phase in ("forward", "backward")]
            costs[method.name] = [*phases, *(size / self.unit for size in sizes), float("inf"), float("inf")]
        for _ in range(REPEATS):
            for method in methods:
                inputs = self.copies()
                dist.barrier(group=self.group)
                wall, cpu = time.perf_counter(), time.process_time()
                self.run(method, inputs)
                spent = torch.tensor([time.process_time() - cpu, time.perf_counter() - wall])
                dist.all_reduce(spent, op=dist.ReduceOp.MAX, group=self.group)
                best = costs[method.name]
                best[4:] = [min(best[4], float(spent[0])), min(best[5], float(spent[1]))]
        return {name: Cost(int(best[0]), int(best[1]), *best[2:]) for name, best in costs.items()}


def worker(rank: int, meeting: str, ranks: int, form: str, peers: Path | None, part: Path) -> None:
    """One rank; rank 0 writes the table of this number of ranks."""
    warnings.simplefilter("ignore")
    group = group_of(rank, ranks, meeting)
    methods = [method for method in load(peers)[0] if method.hidden == (form == "hidden")]
    methods = [method for method in methods if method.sharded or ranks == 1]
    sections = []
    for dtype in (torch.float32, torch.bfloat16) if form == "logits" else (torch.float32,):
        some = [method for method in methods if dtype == torch.float32 or not method.widened]
        bench = Bench(form, dtype, group)
        title = f"TP = {ranks}, {str(dtype).removeprefix('torch.')}: 1 U = {bench.unit / 2**20:.1f} MiB"
        sections.append(f"### {title}\n\n{table(bench.measure(some), bench.unit)}")
    if rank == 0:
        part.write_text("\n\n".join(sections))
    dist.barrier(group=group)
    dist.destroy_process_group()


def table(costs: dict[str, Cost], unit: int) -> str:
    """One line for each method; the ratios are to the first."""
    head = [
        "method",
        "collectives fwd + bwd",
        "peak, U (by RSS)",
        "MiB",
        "CPU s",
        "wall s",
        "time : first",
        "peak : first",
    ]
    ours = next(iter(costs.values()))
    lines = []
    for name, cost in costs.items():
        sizes = [f"{cost.memory:.2f} ({cost.resident:.2f})", f"{cost.memory * unit / 2**20:.0f}"]
        seconds = [f"{cost.cpu:.2f}", f"{cost.wall:.2f}"]
        ratios = [f"{cost.cpu / ours.cpu:.2f}", f"{cost.memory / ours.memory:.2f}"]
        lines.append([name, f"{cost.forward} + {cost.backward}", *sizes, *seconds, *ratios])
    return markdown(head, lines)


def main() -> None:
    """Measure at each number of ranks, one after another, then print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=("logits", "hidden"), help="what the methods are given")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--peers", type=Path, help="directory with the peers' wheels; see vocab_peers.py")
    parser.add_argument("--keep", type=Path, help="file that receives the tables as well")
    options = parser.parse_args()
    sections = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.tp:
            part = Path(folder) / f"{ranks}.md"
            launch(worker, ranks, ranks, options.form, options.peers, part)
            sections.append(part.read_text())
    given = "vocabulary-sharded logits" if options.form == "logits" else f"hidden states, H = {HIDDEN}"
    head = (
        f"# Cost of log-probability and entropy with gradients, from {given}\n\n"
        f"T = {TOKENS}, V = {VOCAB}; forward and backward. The peak is above the inputs and includes the gradients; a U"
        " is one fp32 copy of the rank's logits. Seconds are of one thread, the slowest rank's; at TP = 4 ranks share"
        f" cores. Ratios are to the first line. {NOTES[options.form]}"
    )
    parts = [head, *sections, note_missing(NOT_RUN), footer(f"vocab_cost.py {options.form} --peers DIR", "over gloo")]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.keep:
        options.keep.write_text(text)


if __name__ == "__main__":
    main()
