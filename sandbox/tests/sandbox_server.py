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

# math-verify needs minutes of CPU time to expand this and never looks at signals meanwhile.
HANG = {"kind": "math", "response": r"\boxed{(x+y+z+w)^{399}}", "spec": {"answer": "7"}}


def countdown(response: str, numbers: list[int], target: int) -> dict[str, Any]:
    return {"kind": "countdown", "response": response, "spec": {"numbers": numbers, "target": target}}


def math(response: str, answer: str) -> dict[str, Any]:
    return {"kind": "math", "response": response, "spec": {"answer": answer}}


def code(response: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "code", "response": response, "spec": spec}


def program(source: str, stdin: str, stdout: str, **limits: Any) -> dict[str, Any]:
    """An item whose program has to print ``stdout`` for ``stdin``."""
    spec = {"mode": "stdio", "tests": [{"stdin": stdin, "stdout": stdout}], "extract": False, "limits": limits}
    return code(source, spec)


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
        return [pid for pid in children(self.process.pid) if "rlvr_sandbox.worker" in command_line(pid)]

    def zygotes(self) -> list[int]:
        return [pid for pid in children(self.process.pid) if "rlvr_sandbox.isolation.zygote" in command_line(pid)]

    def metric(self, name: str) -> float:
        """The sum of the named metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    try:
        below = children(pid)
    except OSError:
        return []
    return below + [deeper for child in below for deeper in descendants(child)]


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
def running_code(*options: str) -> Iterator[Server]:
    """A service that runs code: under the best isolation of this machine, or without any."""
    with running(*options) as server:
        if server.http.get("/v1/capabilities").json()["backend"] is not None:
            yield server
            return
    with running("--backend", "none", "--unsafe", *options) as server:
        yield server


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
