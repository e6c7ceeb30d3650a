"""The service that a trainer starts for itself: it answers, it dies with its parent, its failures are sentences."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from megatron_rlvr.core import Prompt, RLVRError, Verdict
from megatron_rlvr.verify import VerifierClient, local_service, service

COUNTDOWN = Prompt(id="c", text="", kind="countdown", spec={"numbers": [2, 5, 9], "target": 16})
HANG = Prompt(id="m", text="", kind="math", spec={"answer": "7"}), r"\boxed{(x+y+z+w)^{399}}"


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def descendants(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return children + [deeper for child in children for deeper in descendants(child)]


def all_gone(pids: list[int], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_answers_and_stops_with_the_block() -> None:
    before = set(descendants(os.getpid()))
    with local_service() as url:
        started = [pid for pid in descendants(os.getpid()) if pid not in before]
        assert len(started) >= 3
        with VerifierClient(url, deadline_s=20, max_infra_error_share=0) as client:
            assert client.verify([(COUNTDOWN, "2+5+9")]) == [Verdict.ACCEPTED]
    assert not answers(url)
    assert all_gone(started, within_s=2)


def test_it_stops_when_the_block_fails() -> None:
    with pytest.raises(ZeroDivisionError), local_service() as url:
        raise ZeroDivisionError
    assert not answers(url)


def test_it_dies_with_a_parent_that_is_killed() -> None:
    script = (
        "import time\n"
        "from megatron_rlvr.verify import local_service\n"
        "with local_service() as url:\n"
        "    print(url, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    url = parent.stdout.readline().strip()
    assert answers(url)
    family = descendants(parent.pid)
    assert len(family) >= 3
    hang = threading.Thread(target=_verify_quietly, args=(url,))
    hang.start()
    time.sleep(0.3)
    parent.kill()
    parent.communicate()
    assert all_gone(family, within_s=5)
    hang.join()


def _verify_quietly(url: str) -> None:
    with VerifierClient(url, deadline_s=1, max_infra_error_share=1.0) as client:
        client.verify([HANG])


def test_a_killed_service_becomes_a_sentence_and_its_verdicts_stay() -> None:
    before = set(descendants(os.getpid()))
    with local_service() as url:
        started = [pid for pid in descendants(os.getpid()) if pid not in before]
        # The service comes before its own children.
        killer = threading.Timer(0.5, os.kill, (started[0], signal.SIGKILL))
        killer.start()
        items = [(COUNTDOWN, "2+5+9"), HANG]
        client = VerifierClient(url, deadline_s=1, max_infra_error_share=0.4)
        with client, pytest.raises(RLVRError, match=f"service at {url} left 1 of 2 responses without a verdict"):
            client.verify(items)
        with VerifierClient(url, deadline_s=0.5, max_infra_error_share=1.0) as client:
            assert client.verify(items) == [Verdict.INFRA_ERROR] * 2
        assert all_gone(started, within_s=2)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RLVRError, match=r"pip install \./sandbox"), local_service():
        pass


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 3", "ended with status 3 instead of listening"),
        ("echo hello; exit 4", "ended with status 4 instead of listening"),
        ("exec sleep 30", "did not start within 0.3 s"),
    ],
)
def test_a_service_that_does_not_start_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, words: str
) -> None:
    executable = tmp_path / "python"
    executable.write_text(f"#!/bin/sh\n{script}\n")
    executable.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(executable))
    monkeypatch.setattr(service, "START_TIMEOUT_S", 0.3 if "sleep" in script else 10)
    with pytest.raises(RLVRError, match=words), local_service():
        pass
