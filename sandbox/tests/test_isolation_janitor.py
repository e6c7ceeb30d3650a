"""What remains of a service that ends by SIGKILL, seen from outside: no file, no cgroup, no mount, no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rlvr_sandbox.isolation import cgroups, choice, delegation
from rlvr_sandbox.isolation.hierarchies import Places
from sandbox_server import SANDBOX, alive, children, command_line, descendants, eventually

WITHIN_S = 5.0
# Its children leave nothing but their process group behind to find them by.
SERVICE = """
import asyncio, sys
from rlvr_sandbox.execution import Limits, Program
from rlvr_sandbox.isolation import delegation, open_executor
if sys.argv[2] == "bare": delegation.find = lambda: "none here"
BUSY = "import os, time\\nfor _ in range(3): os.fork()\\nopen('kept', 'w').write('x')\\ntime.sleep(60)"
async def main():
    executor = await open_executor(sys.argv[1], slots=2, unsafe=sys.argv[1] == "none")
    run = asyncio.create_task(executor.run(Program("python", BUSY), Limits(processes=16)))
    await asyncio.sleep(0.5)
    print(executor.report, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    run.cancel()
    await executor.close()
asyncio.run(main())
"""


@contextmanager
def service(backend: str, cgroup: str, python: str = sys.executable) -> Iterator[subprocess.Popen[str]]:
    command = [python, "-B", "-c", SERVICE, backend, cgroup]
    environment = {**os.environ, "PYTHONPATH": str(SANDBOX)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        if not process.stdout.readline():
            pytest.skip(f"this machine has no {backend}")
        yield process
    finally:
        process.kill()
        process.communicate()


def janitors(pid: int) -> list[int]:
    return [child for child in children(pid) if "isolation.janitor" in command_line(child)]


def traces(pid: int, below: list[int]) -> list[str]:
    """All that tells of the service ``pid`` and of those that were below it."""
    mark = f"{cgroups.PREFIX}{pid}-"
    places = [Path(choice._fast_directory())]
    found = delegation.find()
    if isinstance(found, Places):
        places += map(Path, found.directories)
    named = [str(entry) for place in places for entry in place.iterdir() if entry.name.startswith(mark)]
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if mark in line]
    return [*named, *mounts, *(f"process {child} {command_line(child)}" for child in below if alive(child))]


@pytest.mark.parametrize("backend", ["ns", "landlock", "bwrap", "none"])
@pytest.mark.parametrize("cgroup", ["cgroup", "bare"])
def test_kill_9_leaves_nothing(backend: str, cgroup: str) -> None:
    with service(backend, cgroup, "/usr/bin/python3" if backend == "landlock" else sys.executable) as process:
        below = descendants(process.pid)
        assert len(below) >= 4 + 7
        assert len(traces(process.pid, below)) > len(below)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert eventually(lambda: not traces(process.pid, below), WITHIN_S), traces(process.pid, below)


def test_a_janitor_that_is_killed_is_replaced() -> None:
    with service("none", "cgroup") as process:
        (first,) = janitors(process.pid)
        os.kill(first, signal.SIGKILL)
        assert eventually(lambda: janitors(process.pid) not in ([], [first]), WITHIN_S)
        below = descendants(process.pid)
        process.kill()
    assert eventually(lambda: not traces(process.pid, below), WITHIN_S), traces(process.pid, below)


@pytest.mark.parametrize("how", ["killed with it", "stopped"])
def test_the_next_service_removes_what_nobody_did(how: str) -> None:
    with service("none", "cgroup") as process:
        below = descendants(process.pid)
        os.kill(janitors(process.pid)[0], signal.SIGKILL if how == "killed with it" else signal.SIGSTOP)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    try:
        assert traces(process.pid, [])
        with service("ns", "cgroup"):
            assert eventually(lambda: not traces(process.pid, []), WITHIN_S), traces(process.pid, [])
    finally:
        for pid in below:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_signals_to_the_whole_group_and_a_normal_end_leave_nothing() -> None:
    with service("none", "cgroup") as process:
        below = descendants(process.pid)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(janitors(process.pid)[0], number)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(10) == 0
        assert traces(process.pid, below) == []
