"""A service under load for a while, every tenth item an attack: no wrong verdict, and nothing is left behind.

Ten seconds as a test; ``SOAK_MINUTES=5`` or ``python sandbox/tests/test_sandbox_soak.py --minutes 5`` for longer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from attacks.attack import HELD, KILLED, MEMORY, OUTPUT, TIME, Attack
from attacks.attack_files import ATTACKS as FILES
from attacks.attack_kernel import ATTACKS as KERNEL
from attacks.attack_network import ATTACKS as NETWORK
from attacks.attack_processes import ATTACKS as PROCESSES
from attacks.attack_residue import ATTACKS as RESIDUE
from attacks.attack_resources import ATTACKS as RESOURCES
from rlvr_sandbox.isolation.bait import Bait
from sandbox_server import Server, code, command_line, countdown, descendants, eventually, math, program, running_code

SECONDS = 60 * float(os.environ.get("SOAK_MINUTES", "0.17"))
THREADS = 3
BATCH = 20
MAX_RSS_GROWTH = 1.3

# What may be said of an attack that ends in one of these ways.
_VERDICTS: dict[tuple[Any, ...], set[str]] = {
    HELD: {"accepted"},
    TIME: {"time_limit"},
    MEMORY: {"memory_limit", "runtime_error"},
    OUTPUT: {"output_limit"},
    KILLED: {"runtime_error"},
}

Expected = tuple[dict[str, Any], set[str]]


def attacks(bait: Bait) -> list[Expected]:
    """The attacks in Python that are over soon, as items that print ``held``."""
    found: list[Expected] = []
    for attack in (*FILES, *PROCESSES, *KERNEL, *NETWORK, *RESOURCES, *RESIDUE):
        if attack.language == "python" and attack.endings in _VERDICTS and attack.limits.cpu_s <= 4:
            found.append((_item(attack, bait), _VERDICTS[attack.endings]))
    return found


def _item(attack: Attack, bait: Bait) -> dict[str, Any]:
    limits = attack.limits
    megabytes = max(32, limits.memory_bytes >> 20)
    return program(
        bait.program(attack.source), "", "held", cpu_s=limits.cpu_s, memory_mb=megabytes, processes=limits.processes
    )


def honest(number: int) -> list[Expected]:
    """Items of every kind and mode, right and wrong, that the service has not seen before."""
    n = number + 2
    call = {"mode": "call", "entry_point": "f", "tests": [{"args": [k], "expected": k * n} for k in range(4)]}
    split = {"mode": "split", "entry_point": "f", "test_code": f"def check(f):\n    assert f(3) == {3 * n}\n"}
    items: list[Expected] = []
    for wrong, verdict in ((0, "accepted"), (1, "wrong_answer")):
        source = f"def f(x):\n    return x * {n} + {wrong}\n"
        items += [
            (program(f"print(int(input()) * {n})", "7", f"{7 * n + wrong}"), {verdict}),
            *[(code(f"```python\n{source}```", spec), {verdict}) for spec in (call, split)],
            (math(rf"\boxed{{\frac{{{n}}}{{7}}}}", f"{n + wrong}/7"), {verdict}),
            (countdown(f"{n}+1", [1, n], n + 1 + wrong), {verdict}),
        ]
    items.append((program(f"raise ValueError({n})", "", "1"), {"runtime_error"}))
    return items


def _workspace(zygote: int) -> str:
    """Where the slot of ``zygote`` keeps its files, as its command line says."""
    arguments = command_line(zygote).split("\0")
    return next((json.loads(text)["workspace"] for text in arguments if '"workspace"' in text), "")


class Belongings:
    """What a service holds on to: processes, descriptors, mounts, control groups, files, memory."""

    def __init__(self, server: Server, temporary: str) -> None:
        service = server.process.pid
        family = [service, *descendants(service)]
        self.processes = len(family)
        self.descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family)
        self.mounts = [len(Path(f"/proc/{pid}/mounts").read_text().splitlines()) for pid in (os.getpid(), *family)]
        self.groups = sum(1 for root, *_ in os.walk("/sys/fs/cgroup") if "rlvr" in root)
        roots = {temporary, *map(_workspace, server.zygotes())}
        self.files = sum(len(folders) + len(files) for root in roots for _, folders, files in os.walk(root))
        pages = int(Path(f"/proc/{service}/statm").read_text().split()[1])
        self.resident = pages * os.sysconf("SC_PAGE_SIZE")

    def leaks(self, before: Belongings) -> dict[str, Any]:
        """What there is more of now."""
        counts = {
            name: (getattr(before, name), getattr(self, name))
            for name in ("processes", "descriptors", "mounts", "groups", "files")
        }
        return {name: pair for name, pair in counts.items() if pair[1] > pair[0]}


def soak(server: Server, seconds: float) -> Counter[str]:
    """Judge for ``seconds``; returns how often each verdict was given, after checking every one."""
    numbers, end = itertools.count(1), time.monotonic() + seconds
    counts: Counter[str] = Counter()
    wrong: list[tuple[dict[str, Any], str, set[str]]] = []
    lock = threading.Lock()
    isolated = server.http.get("/v1/capabilities").json()["backend"] == "ns"

    def judge(hostile: list[Expected], chance: random.Random) -> None:
        while time.monotonic() < end:
            items = [item for _ in range(2) for item in honest(next(numbers))][: BATCH - BATCH // 10]
            if isolated:
                items += chance.sample(hostile, BATCH // 10)
            chance.shuffle(items)
            results = server.verify([item for item, _ in items], deadline_s=120)
            with lock:
                for (item, expected), result in zip(items, results, strict=True):
                    counts[result["verdict"]] += 1
                    counts["attacks"] += "BAIT" in item["response"]
                    if result["verdict"] not in expected:
                        wrong.append((item, str(result), expected))

    with Bait() as bait, ThreadPoolExecutor(THREADS) as pool:
        hostile = attacks(bait)
        for future in [pool.submit(judge, hostile, random.Random(seed)) for seed in range(THREADS)]:
            future.result()
        assert bait.taken() == ""
    assert not wrong, wrong[:3]
    return counts


def settled(server: Server, temporary: str) -> Belongings:
    """What the service holds on to once it has nothing to do."""
    assert eventually(lambda: server.http.get("/readyz").json()["pending"] == 0, within_s=10)
    # Connections that wait for the next request are descriptors too.
    url = server.http.base_url
    server.http.close()
    time.sleep(1.5)
    belongings = Belongings(server, temporary)
    server.http = httpx.Client(base_url=url, timeout=180, trust_env=False)
    return belongings


def run(seconds: float) -> str:
    """Soak a service of its own for ``seconds`` and say how it went."""
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", temporary)
        with running_code() as server:
            soak(server, min(2.0, seconds))  # until every slot that there may be has been started
            before, restarts = settled(server, temporary), server.metric("rlvr_sandbox_slot_restarts_total")
            counts = soak(server, seconds)
            after = settled(server, temporary)
            restarts = server.metric("rlvr_sandbox_slot_restarts_total") - restarts
    leaks, growth = after.leaks(before), after.resident / before.resident
    report = f"{seconds:g} s: {dict(counts)}; slot restarts {restarts:g}; leaks {leaks}; memory x{growth:.2f}"
    assert not leaks, report
    assert growth < MAX_RSS_GROWTH, report
    assert counts["infra_error"] == 0, report
    return report


def test_a_soak_leaves_nothing_behind_and_judges_right() -> None:
    print(run(SECONDS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to soak (default: %(default)s)")
    print(run(60 * parser.parse_args().minutes))
    sys.exit(0)
