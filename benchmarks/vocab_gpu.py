r"""The output head on one Hopper GPU: is it right, how near to the GEMM floor, how much memory, and beside whom.

    python benchmarks/vocab_gpu.py                         # about 8 minutes; needs no network
    python benchmarks/vocab_gpu.py --peers DIR             # with verl and Liger, see vocab_gpu_methods.py
    python benchmarks/vocab_gpu.py --smoke                 # on a CPU: does the script run? Writes nothing

    PYTHONPATH=. python3 benchmarks/vocab_gpu.py --commit HASH --keep $OUT/vocab_gpu.md    # on a bare machine

First the kernels are checked against float64 (`vocab_gpu_checks.py`, and the tests of the kernels where pytest is
there); figures of a wrong kernel are not printed. Then, for every shape, one unit of GEMM work is measured: the logits,
hidden-gradient and weight-gradient products with bf16 operands, whose sum is the floor that "of floor" refers to (for a
forward pass: the first alone). Methods take turns; times are medians from CUDA events. Memory is the peak of what
was allocated on top of hidden states, weight and, for ``main_grad``, its fp32 accumulator. Gradients are compared with
those of the first method on the same inputs: "off" is the norm of the difference in the hidden states' gradient.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from vocab_common import markdown
from vocab_gpu_checks import report as check_kernels
from vocab_gpu_methods import Method, Problem, all_methods, problem_of

from megatron_rlvr.vocab import token_stats
from megatron_rlvr.vocab.rows import Backend

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((1536, 151936), (4096, 151936), (8192, 16032))
TOKENS = (8192, 32768)


class Bench:
    """The device, its clock, the budget of seconds, and the report so far."""

    def __init__(self, device: torch.device, turns: int, seconds: float, keep: Path | None) -> None:
        """Start the clock of the budget."""
        self.device, self.turns, self.keep = device, turns, keep
        self.deadline = time.monotonic() + seconds
        self.sections: list[str] = []

    def say(self, text: str) -> None:
        """Add to the report; it is written at once, so that a run that is cut off leaves what it has."""
        print(text + "\n", flush=True)
        self.sections.append(text)
        if self.keep is not None:
            self.keep.write_text("\n\n".join(self.sections) + "\n")

    def over(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() > self.deadline

    def time(self, work: Callable[[], Any]) -> float:
        """Milliseconds of one run."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    def median(self, work: Callable[[], Any]) -> float:
        """Median of several runs after two that do not count."""
        times = [self.time(work) for _ in range(2 + self.turns)]
        return statistics.median(times[2:])

    def peak(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """GiB that one run allocates on top of what is there, at most, and what it returns."""
        if self.device.type != "cuda":
            return math.nan, work()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30, made


def floor_of(bench: Bench, problem: Problem) -> tuple[float, float]:
    """Milliseconds of the logits' GEMM, and of it with both gradient GEMMs, over all tokens at once."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits_TV = hidden @ weight.t()
    forward = bench.median(lambda: torch.mm(hidden, weight.t(), out=logits_TV))
    dhidden = bench.median(lambda: logits_TV @ weight)
    dweight = bench.median(lambda: logits_TV.t() @ hidden)
    return forward, forward + dhidden + dweight


def chunk_rates(bench: Bench, problem: Problem, rows: int) -> str:
    """Rates of the products as the package forms them for chunks of ``rows``: fp32 logits, fp32 accumulation."""
    hidden, weight = problem.hidden.detach()[:rows], problem.weight.detach()
    logits = torch.empty(len(hidden), len(weight), device=bench.device)
    grad = torch.randn_like(logits, dtype=weight.dtype)
    main_grad: torch.Tensor = problem.weight.main_grad  # type: ignore[attr-defined]
    work = {
        "logits": lambda: torch.ops.aten.mm.dtype_out(hidden, weight.t(), torch.float32, out=logits),
        "hidden gradient": lambda: grad @ weight,
        "weight gradient": lambda: torch.ops.aten.addmm.dtype_out(
            main_grad, grad.t(), hidden, torch.float32, out=main_grad
        ),
    }
    flop = 2 * len(hidden) * weight.numel()
    rates = [f"{name} {flop / bench.median(run) / 1e9:.0f}" for name, run in work.items()]
    return f"{rows} rows: " + ", ".join(rates) + " TFLOP/s"


def failures() -> tuple[type[Exception], ...]:
    """What a peer raises that does not fit this device or these packages."""
    general = (RuntimeError, ImportError, AttributeError, TypeError, ValueError, AssertionError)
    if importlib.util.find_spec("triton") is None:
        return general
    return (*general, importlib.import_module("triton").TritonError)


def first_run(bench: Bench, method: Method, problem: Problem) -> tuple[float, Any] | str:
    """Peak GiB and result of a method, or why it cannot run here. The run before that one compiles and tunes."""
    try:
        method.run(problem)
        return bench.peak(functools.partial(method.run, problem))
    except failures() as error:
        first = str(error).strip().splitlines()
        return type(error).__name__ + (f": {first[0][:100]}" if first else "")


def shape(bench: Bench, methods: list[Method], tokens: int, hidden: int, vocab: int) -> None:
    """One table: every method on one shape."""
    problem = problem_of(tokens, hidden, vocab, bench.device, seed=tokens + hidden)
    unit, floor = floor_of(bench, problem)
    rates = [chunk_rates(bench, problem, rows) for rows in (4096, 8192) if problem.hidden.is_cuda]
    able, refused, memory, off = [], {}, {}, {}
    reference: torch.Tensor | None = None
    for method in methods:
        outcome = "the time budget was spent" if bench.over() else first_run(bench, method, problem)
        if isinstance(outcome, str):
            refused[method.name] = outcome
            continue
        able.append(method)
        memory[method.name], made = outcome
        if method.units == 3 and method.same_loss:
            reference = made[0].detach() if reference is None else reference
            off[method.name] = f"{float((made[0] - reference).float().norm() / reference.float().norm()):.1e}"
        del outcome, made
    times: dict[str, list[float]] = {method.name: [] for method in able}
    for _ in range(bench.turns):
        for method in able:
            times[method.name].append(bench.time(functools.partial(method.run, problem)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    yardstick, base = "torch, materialised", {1: unit, 3: floor}
    lines = [
        [
            method.name,
            f"{medians[method.name]:.2f}",
            f"{base[method.units] / medians[method.name]:.2f}",
            f"{medians[yardstick] / medians[method.name]:.2f}" if method.units == 3 and yardstick in medians else "–",
            f"{memory[method.name]:.2f}",
            f"{memory[yardstick] / memory[method.name]:.1f}" if method.units == 3 and yardstick in memory else "–",
            off.get(method.name, "–"),
        ]
        for method in able
    ]
    flop = 2 * tokens * hidden * vocab
    title = f"### T = {tokens}, H = {hidden}, V/tp = {vocab}"
    gemm = f"Floor {floor:.2f} ms ({3 * flop / floor / 1e9:.0f} TFLOP/s), its forward part {unit:.2f} ms."
    head = ["head", "ms", "of floor", "× as fast as materialised", "peak GiB", "× leaner than materialised", "off"]
    missing = [f"Not run here: {name} ({reason})." for name, reason in refused.items()]
    bench.say("\n\n".join([title, " ".join([gemm, *(f"In chunks of {rate}." for rate in rates)])]))
    bench.say("\n\n".join([markdown(head, lines), *missing]))


def bandwidth(bench: Bench, tokens: int, vocab: int) -> list[str]:
    """GB/s of the row passes over logits that exist, in the bytes that must be moved: 2 forward, 6 with gradient."""
    dtype = torch.bfloat16
    generator = torch.Generator(bench.device).manual_seed(vocab)
    logits = torch.randn(tokens, vocab, generator=generator, device=bench.device, dtype=dtype).mul_(2.0)
    targets = torch.randint(vocab, (tokens,), generator=generator, device=bench.device)
    ones = torch.ones(tokens, device=bench.device)
    backend: Backend = "triton" if logits.is_cuda else "torch"
    other = torch.empty_like(logits)

    def forward(extras: bool) -> Callable[[], Any]:
        return torch.no_grad()(lambda: token_stats(logits, targets, extras=extras, backend=backend))

    def both() -> None:
        leaf = logits.detach().requires_grad_()
        stats = token_stats(leaf, targets, reuse_logits=True, backend=backend)
        torch.autograd.grad([stats.logprob, stats.entropy], leaf, [ones, ones])

    def torch_both() -> None:
        leaf = logits.detach().requires_grad_()
        logp_TV = leaf.float().log_softmax(dim=-1)
        entropy_T = -(logp_TV.exp() * logp_TV).sum(dim=-1)
        torch.autograd.grad([logp_TV.gather(1, targets[:, None])[:, 0], entropy_T], leaf, [ones, ones])

    passes: list[tuple[int, Callable[[], Any]]] = [
        (4, lambda: other.copy_(logits)),
        (2, forward(False)),
        (2, forward(True)),
        (6, both),
        (6, torch_both),
    ]
    cells = [f"{tokens} × {vocab}"]
    for size, work in passes:
        try:
            cells.append(f"{size * logits.numel() / bench.median(work) / 1e6:.0f}")
        except torch.OutOfMemoryError:
            cells.append("does not fit")
    return cells


def run_tests() -> str:
    """The kernels' own tests on the device, in a process of their own."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not here, so the tests of the kernels were not run"
    files = [str(ROOT / "tests" / "vocab" / name) for name in ("triton_rows_checks.py", "triton_api_checks.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-o", "addopts=", *files]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the tests of the kernels fail on this device:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1].strip("= ")


def commit_of() -> str:
    """The commit of the tree, or that there is no repository."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder into which verl and liger-kernel were installed")
    parser.add_argument("--keep", type=Path, default=ROOT / "benchmarks" / "results" / "vocab_gpu.md")
    parser.add_argument("--commit", default=commit_of(), help="of the tree, where it travels without its repository")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=420.0, help="after which methods are left out")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, backend='torch', nothing written")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("vocab_gpu.py measures a GPU and torch sees none here; give --smoke to try the script on the CPU")
    device = torch.device("cpu" if options.smoke else "cuda")
    bench = Bench(device, options.turns, options.seconds, None if options.smoke else options.keep)
    name = "CPU (smoke run, not a measurement)" if options.smoke else torch.cuda.get_device_name()
    triton = "" if options.smoke else f", triton {importlib.import_module('triton').__version__}"
    bench.say(
        f"# The output head on one GPU\n\n{name}, torch {torch.__version__}{triton}, {date.today()}, commit "
        f"{options.commit}, `python benchmarks/vocab_gpu.py`. Columns are explained at the top of that file."
    )
    seed = time.time_ns() % 2**31
    lines, good = check_kernels(device, seed, (1003,)) if options.smoke else check_kernels(device, seed)
    head = ["logits", "dtype", "log p, worst relative", "H, worst relative", "gradient, of its norm", "passes"]
    tests = "" if options.smoke else f" Tests of the kernels: {run_tests()}."
    bench.say(f"## Against float64\n\n{markdown(head, lines)}\n\nSeed {seed}; tp = 1, 4, 8.{tests}")
    if not good:
        sys.exit("the row passes are wrong on this device; nothing was timed")
    methods, missing = all_methods(options.peers)
    bench.say("## From hidden states" + "".join(f"\n\nNot run: {who} ({why})." for who, why in missing.items()))
    shapes, tokens = (((32, 500),), (64,)) if options.smoke else (SHAPES, TOKENS)
    for count in tokens:
        for hidden, vocab in shapes:
            shape(bench, methods, count, hidden, vocab)
            gc.collect()
    head = ["bf16 logits", "copy", "forward", "forward with extras", "with gradient, in place", "torch, with gradient"]
    sizes = ((64, 500),) if options.smoke else ((8192, 151936), (32768, 16032))
    lines = [bandwidth(bench, *size) for size in sizes]
    bench.say(f"## From logits: token_stats, GB/s of the bytes that must be moved\n\n{markdown(head, lines)}")


if __name__ == "__main__":
    main()
