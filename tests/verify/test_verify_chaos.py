"""The client while services are killed, stopped and started again: right verdicts, by the deadline."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megatron_rlvr.core import Prompt, Verdict
from megatron_rlvr.verify import VerifierClient

SLACK_S = 2.0
NUMBERS = iter(range(1, 10**9))


class Service:
    """A service at a port of its own that can be killed and started again."""

    def __init__(self) -> None:
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            self.port = reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "rlvr_sandbox", "serve", "--port", str(self.port), "--exit-with-parent"]
        self.process = subprocess.Popen(
            [*command, "--workers", "1", "--slots", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("rlvr-sandbox listening on ")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def services(count: int) -> Iterator[list[Service]]:
    started = [Service() for _ in range(count)]
    try:
        yield started
    finally:
        for service in started:
            service.kill()


def items(count: int) -> tuple[list[tuple[Prompt, str]], list[Verdict]]:
    """New games, every third one answered wrongly, with their verdicts."""
    pairs, verdicts = [], []
    for _ in range(count):
        n = next(NUMBERS)
        prompt = Prompt(id=str(n), text="", kind="countdown", spec={"numbers": [n, 1], "target": n + 1})
        pairs.append((prompt, f"{n}+1" if n % 3 else f"{n}-1"))
        verdicts.append(Verdict.ACCEPTED if n % 3 else Verdict.WRONG_ANSWER)
    return pairs, verdicts


def later(seconds: float, action: object, *arguments: object) -> threading.Timer:
    timer = threading.Timer(seconds, action, arguments)  # type: ignore[arg-type]
    timer.start()
    return timer


def test_a_restart_under_load_costs_no_verdict() -> None:
    with services(1) as (service,), VerifierClient(service.url, deadline_s=60, max_infra_error_share=0) as client:
        stop = threading.Event()

        def restart() -> None:
            service.kill()
            service.start()
            stop.set()

        later(0.3, restart)
        rounds = 0
        while not stop.is_set() or rounds < 5:
            pairs, verdicts = items(3000)
            assert client.verify(pairs) == verdicts
            rounds += 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_other_replica_takes_over(how: signal.Signals) -> None:
    with services(2) as (lost, left):
        url = f"{lost.url},{left.url}"
        with VerifierClient(url, deadline_s=30, max_infra_error_share=0) as client:
            later(0.1, lost.signal, how)
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                pairs, verdicts = items(2000)
                started = time.monotonic()
                assert client.verify(pairs) == verdicts
                assert time.monotonic() - started < 20


def test_a_service_that_stands_still_is_answered_for_by_the_deadline() -> None:
    with services(1) as (service,), VerifierClient(service.url, deadline_s=2, max_infra_error_share=1) as client:
        service.signal(signal.SIGSTOP)
        pairs, verdicts = items(1500)
        started = time.monotonic()
        assert client.verify(pairs) == [Verdict.INFRA_ERROR] * 1500
        assert time.monotonic() - started < 2 + SLACK_S
        service.signal(signal.SIGCONT)
        pairs, verdicts = items(50)
        assert client.verify(pairs) == verdicts
