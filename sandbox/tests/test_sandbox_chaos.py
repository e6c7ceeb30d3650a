"""Processes killed and stopped, disks full, clients gone: every request is answered by its deadline and 2 s."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sandbox_server import Server, alive, code, command_line, descendants, eventually, math, program, running_code

SLACK_S = 2.0
DEADLINE_S = 12.0
CALL = {"mode": "call", "entry_point": "f", "tests": [{"args": [n], "expected": n * n} for n in range(5)]}
SPLIT = {"mode": "split", "entry_point": "f", "test_code": "def check(f):\n    assert f(3) == 9\n"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_code("--item-seconds", "1") as server:
        yield server


def work(round_: int) -> list[tuple[dict[str, Any], str]]:
    """Items with their verdicts; each round's are new to the service."""
    right, wrong = (
        f"```python\ndef f(x):\n    return x * x  # {round_}\n```",
        f"```python\ndef f(x):\n    return x + {round_}\n```",
    )
    busy = f"s = sum(i * i for i in range(300000))\nprint(int(input()) + 1)  # {round_}"
    functions = ((right, "accepted"), (wrong, "wrong_answer"))
    return [
        (program(busy, "3", "4"), "accepted"),
        (program(busy, "3", "5"), "wrong_answer"),
        *[(code(response, spec), verdict) for spec in (CALL, SPLIT) for response, verdict in functions],
        (math(rf"\boxed{{{round_}/3}}", f"{round_}/3"), "accepted"),
        (math(rf"\boxed{{{round_}.25}}", f"{round_}"), "wrong_answer"),
    ]


def judged_under(
    server: Server, chaos: Callable[[], None], rounds: int = 4, threads: int = 3, also: str = "infra_error"
) -> Counter[str]:
    """Judge while ``chaos`` is made again and again; a verdict must be the right one, ``infra_error`` or ``also``."""
    over = threading.Event()

    def make_chaos() -> None:
        while not over.wait(0.25):
            chaos()

    def judge(round_: int) -> Counter[str]:
        items = work(1 + round_ + random.randrange(10**6) * 10)
        started = time.monotonic()
        verdicts = server.verdicts([item for item, _ in items], DEADLINE_S)
        assert time.monotonic() - started < DEADLINE_S + SLACK_S
        for verdict, (item, expected) in zip(verdicts, items, strict=True):
            assert verdict in (expected, "infra_error", also), (item, verdict)
        return Counter(verdicts)

    maker = threading.Thread(target=make_chaos, daemon=True)
    maker.start()
    try:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(judge, range(rounds)), Counter())
    finally:
        over.set()
        maker.join()


def assert_well(server: Server) -> None:
    """Everything is judged again, without delay and without a process too many."""
    expected = [verdict for _, verdict in work(0)]

    def well() -> bool:
        return server.verdicts([item for item, _ in work(random.randrange(10**9))], DEADLINE_S) == expected

    assert eventually(well, within_s=15)
    started = time.monotonic()
    assert server.verdicts([program("print(1)", "", "1")] * 8) == ["accepted"] * 8
    assert time.monotonic() - started < 10
    assert server.http.get("/readyz").json() == {"ready": True, "pending": 0}


def shoot(pids: list[int], how: signal.Signals) -> None:
    for pid in random.sample(pids, min(1, len(pids))):
        with suppress(ProcessLookupError):
            os.kill(pid, how)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["kill -9", "SIGSTOP"])
@pytest.mark.parametrize("whom", ["zygotes", "workers", "anybody below"])
def test_processes_die_or_stand_still_under_load(server: Server, whom: str, how: signal.Signals) -> None:
    victims = {
        "zygotes": server.zygotes,
        "workers": server.workers,
        "anybody below": lambda: descendants(server.process.pid),
    }[whom]
    shots = iter(range(4))

    def chaos() -> None:
        if next(shots, None) is not None:
            shoot(victims(), how)

    # Where the shot hits the program itself, its death by a signal is a crash like any other: to call it a fault of the
    # service would let programs that get themselves killed go unpunished.
    counts = judged_under(server, chaos, also="runtime_error" if whom == "anybody below" else "infra_error")
    assert counts["accepted"] + counts["wrong_answer"] >= 0.5 * counts.total(), counts
    assert_well(server)


def test_idle_slots_that_die_are_replaced(server: Server) -> None:
    before = [pid for pid in descendants(server.process.pid) if "janitor" not in command_line(pid)]
    for pid in server.zygotes():
        os.kill(pid, signal.SIGKILL)
    assert_well(server)
    assert eventually(lambda: not any(alive(pid) for pid in before if pid not in server.workers()), within_s=5)


def test_clients_that_go_away_take_their_work_with_them(server: Server) -> None:
    host, port = server.http.base_url.host, server.http.base_url.port
    body = server.http.build_request(
        "POST", "/v1/verify", json={"items": [program("import time\ntime.sleep(30)", "", "1")] * 20, "deadline_s": 60}
    ).read()
    head = f"POST /v1/verify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"

    def leave() -> None:
        for accept, part in (("application/json", 1.0), ("application/x-ndjson", 1.0), ("application/json", 0.5)):
            with socket.create_connection((host, port)) as connection:
                connection.sendall(f"{head}accept: {accept}\r\n\r\n".encode() + body[: int(part * len(body))])
                time.sleep(0.02)

    judged_under(server, leave, rounds=3)
    assert eventually(lambda: server.http.get("/readyz").json()["pending"] == 0, within_s=5)
    assert_well(server)


def test_programs_that_fill_their_disk_fill_nobody_elses(server: Server) -> None:
    fill = "try:\n    open('big', 'wb').write(b'x' * (1 << 28))\nexcept OSError:\n    print('full')"
    items = [
        item for n in range(6) for item in (program(f"{fill}  # {n}", "", "full"), program(f"print({n})", "", f"{n}"))
    ]
    verdicts = server.verdicts(items)
    assert verdicts[1::2] == ["accepted"] * 6
    assert set(verdicts[::2]) <= {"accepted", "output_limit", "runtime_error"}
    assert_well(server)


@contextmanager
def full_disk() -> Iterator[Path]:
    """A file system without a free byte."""
    with tempfile.TemporaryDirectory(prefix="rlvr-full-") as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
        )
        if mounted.returncode != 0:
            pytest.skip("a file system cannot be mounted here")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_of_the_service_breaks_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    with full_disk() as disk:
        monkeypatch.setenv("TMPDIR", str(disk))
        with running_code() as server:
            try:
                with open(disk / "filler", "wb", buffering=0) as file:
                    while True:
                        file.write(b"x" * 4096)
            except OSError:
                pass
            assert not os.statvfs(disk).f_bavail
            items = [*work(1), (program("print(2)", "", "2"), "accepted")]
            compiled = '#include <cstdio>\nint main() { puts("hi"); }'
            if "cpp" in server.http.get("/v1/capabilities").json()["languages"]:
                spec = {"language": "cpp", "mode": "stdio", "tests": [{"stdin": "", "stdout": "hi"}], "extract": False}
                items.append((code(compiled, spec), "accepted"))
            started = time.monotonic()
            verdicts = server.verdicts([item for item, _ in items], DEADLINE_S)
            assert time.monotonic() - started < DEADLINE_S + SLACK_S
            for verdict, (_, expected) in zip(verdicts, items, strict=True):
                assert verdict in (expected, "infra_error")
            (disk / "filler").unlink()
            assert_well(server)
