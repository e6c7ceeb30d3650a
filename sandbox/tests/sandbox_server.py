"""A real service for the tests, and a look at its processes through /proc."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

SANDBOX = Path(__file__).resolve().parents[1]

# Python needs minutes of CPU time for this power tower and never looks at signals meanwhile.
HANG = {"kind": "math", "response": r"\boxed{9^{9^{9^9}}}", "spec": {"answer": "7"}}


def countdown(response: str, numbers: list[int], target: int) -> dict[str, Any]:
    return {"kind": "countdown", "response": response, "spec": {"numbers": numbers, "target": target}}


def math(response: str, answer: str) -> dict[str, Any]:
    return {"kind": "math", "response": response, "spec": {"answer": answer}}


class Server:
    """A running service, its HTTP client and its process."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def verify(self, items: list[dict[str, Any]], deadline_s: float = 30) -> list[dict[str, Any]]:
        reply = self.http.post("/v1/verify", json={"items": items, "deadline_s": deadline_s})
        assert reply.status_code == 200, reply.text
        return reply.json()["results"]

    def verdicts(self, items: list[dict[str, Any]], deadline_s: float = 30) -> list[str]:
        return [result["verdict"] for result in self.verify(items, deadline_s)]

    def workers(self) -> list[int]:
        return children(self.process.pid)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def eventually(condition: Callable[[], bool], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return held


@contextmanager
def running(*options: str) -> Iterator[Server]:
    path = os.pathsep.join(filter(None, [str(SANDBOX), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "rlvr_sandbox", "serve", "--port", "0", "--exit-with-parent", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("rlvr-sandbox listening on http://127.0.0.1:"), line
        yield Server(process, line.split()[-1])
    finally:
        process.kill()
        process.communicate()
