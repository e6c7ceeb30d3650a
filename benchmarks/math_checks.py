"""Cost and safety of the math checker, beside math-verify alone in the same run.

    python benchmarks/math_checks.py                 # about 4 minutes on one idle core
    python benchmarks/math_checks.py --pairs 400     # quicker

Ordinary answers are judged by one worker process of the service; then answers made to hang a checker, each against four
references. CPU time is the worker's own clock, so a busy machine changes the rate but not the milliseconds. math-verify
alone runs in a process of its own with its default timeouts of 5 s.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import time
from collections import Counter
from multiprocessing.connection import Connection

import math_inputs as inputs
from rlvr_sandbox.process import WorkerProcess, WorkItem

ITEM_CPU_S = 2.5
TICK_S = 0.05


def share(values: list[float], quantile: float) -> float:
    """The quantile of ``values``."""
    return sorted(values)[min(len(values) - 1, int(quantile * len(values)))]


class Meter:
    """One worker of the service, judged by its CPU clock and replaced when it overruns, as the pool does."""

    def __init__(self) -> None:
        self.respawned = 0
        self._worker: WorkerProcess | None = None

    async def judge(self, response: str, gold: str) -> tuple[str, str, float]:
        """Verdict, stage, and CPU seconds of one item."""
        worker = self._worker = self._worker or await WorkerProcess.spawn()
        start = worker.clock().cpu_s
        worker.send([WorkItem("math", response, {"answer": gold})])
        while True:
            judgements = await worker.judgements(TICK_S)
            used = worker.clock().cpu_s - start
            if judgements:
                stage = judgements[0].flags[0].removeprefix("stage:") if judgements[0].flags else ""
                return judgements[0].verdict, stage, used
            if worker.ended or used > ITEM_CPU_S:
                await self.close()
                self.respawned += 1
                return "worker died" if used <= ITEM_CPU_S else "time_limit", "killed", used

    async def rate(self, pairs: list[tuple[str, str]]) -> tuple[float, float]:
        """Items per wall second and per CPU second of one worker that judges ``pairs`` in chunks."""
        worker = self._worker = self._worker or await WorkerProcess.spawn()
        items = [WorkItem("math", rf"\boxed{{{answer}}}", {"answer": gold}) for gold, answer in pairs]
        before, done = worker.clock(), 0
        for at in range(0, len(items), 64):
            chunk = items[at : at + 64]
            worker.send(chunk)
            done += len(chunk)
            while done > 0:
                done -= len(await worker.judgements(10.0))
        after = worker.clock()
        return len(items) / (after.wall_s - before.wall_s), len(items) / (after.cpu_s - before.cpu_s)

    async def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            await self._worker.kill()
        self._worker = None


def reference_worker(pipe: Connection) -> None:
    """math-verify alone: answers (gold, response) with the verdict and the CPU seconds."""
    from math_verify import parse, verify  # type: ignore[import-untyped]

    logging.disable(logging.CRITICAL)
    for gold, response in iter(pipe.recv, None):
        start = time.process_time()
        accepted = bool(verify(parse(rf"\boxed{{{gold}}}"), parse(response)))
        pipe.send((accepted, time.process_time() - start))


def reference(pairs: list[tuple[str, str]]) -> list[tuple[bool, float]]:
    """math-verify's verdicts on (gold, response) pairs, in one process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=reference_worker, args=(theirs,), daemon=True)
    process.start()
    results = []
    for pair in pairs:
        ours.send(pair)
        results.append(ours.recv())
    ours.send(None)
    process.join(10)
    return results


async def ordinary_answers(meter: Meter, pairs: list[tuple[str, str]]) -> None:
    """Print coverage, cost and rate on ordinary answers, and math-verify's beside them."""
    judged = [await meter.judge(rf"\boxed{{{answer}}}", gold) for gold, answer in pairs]
    # A fresh worker and no pair twice: nothing comes from the cache of results.
    await meter.close()
    rates = await meter.rate(list(dict.fromkeys(pairs)))
    algebra = [cost for _, stage, cost in judged if stage == "symbolic"]
    alone = reference([(gold, rf"\boxed{{{answer}}}") for gold, answer in pairs])
    stages = Counter(stage for _, stage, _ in judged)
    print("| ordinary answers | checks/s wall | checks/s CPU | CPU-ms p50 | p90 | p99 | max |")
    print("|---|---|---|---|---|---|---|")
    for name, costs, speed in (
        ("cascade, one worker", [cost for *_, cost in judged], rates),
        ("  of these, computer algebra", algebra, None),
        ("math-verify alone", [cost for _, cost in alone], None),
    ):
        cells = [f"{1e3 * share(costs, quantile):.2f}" for quantile in (0.5, 0.9, 0.99, 1.0)]
        per_second = f"{speed[0]:.0f} | {speed[1]:.0f}" if speed else f"– | {len(costs) / sum(costs):.0f}"
        print(f"| {name} | {per_second} | {' | '.join(cells)} |")
    print("\nstages:", ", ".join(f"{stage} {100 * count / len(judged):.1f} %" for stage, count in stages.most_common()))
    differ = {
        (gold, answer, verdict)
        for (gold, answer), (verdict, *_), (accepted, _) in zip(pairs, judged, alone, strict=True)
        if (verdict == "accepted") != accepted
    }
    print(f"verdicts that differ from math-verify's: {len(differ)} distinct pairs")
    for gold, answer, verdict in sorted(differ):
        print(f"    {gold!r} / {answer!r}: {verdict} here")


async def hanging_answers(meter: Meter, golds: tuple[str, ...]) -> None:
    """Print the worst CPU seconds of every hang input, and math-verify's beside them."""
    print("\n| hang input | verdict | stage | worst CPU-s | math-verify alone, CPU-s |")
    print("|---|---|---|---|---|")
    responses = {name: rf"\boxed{{{text}}}" for name, text in inputs.HANGS.items()} | inputs.UNMARKED_HANGS
    worst_of_all, accepted = 0.0, 0
    for name, response in responses.items():
        results = [await meter.judge(response, gold) for gold in golds]
        verdict, stage, worst = max(results, key=lambda result: result[2])
        theirs = reference([(golds[0], response)])[0][1]
        accepted += sum(result[0] == "accepted" for result in results)
        worst_of_all = max(worst_of_all, worst)
        print(f"| {name} | {verdict} | {stage} | {worst:.2f} | {theirs:.2f} |", flush=True)
    print(
        f"\n{len(responses)} inputs x {len(golds)} references: worst {worst_of_all:.2f} CPU-s, {accepted} accepted, ",
        end="",
    )
    print(f"{meter.respawned} workers killed and replaced")


async def run(options: argparse.Namespace) -> None:
    """The whole benchmark."""
    meter = Meter()
    try:
        await ordinary_answers(meter, inputs.ordinary(options.pairs))
        await hanging_answers(meter, inputs.HANG_GOLDS)
    finally:
        await meter.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2_000, help="ordinary answers to judge")
    asyncio.run(run(parser.parse_args()))
