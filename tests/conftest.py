"""Shared by all rooms: one thread per process, no network, the demo's base model, command-line runs of the trainer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# The machines that run the tests are shared: how long an example takes says nothing about the code.
settings.register_profile("shared", deadline=None, max_examples=50)
settings.load_profile("shared")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "countdown" / "demo.yaml"


@pytest.fixture(scope="session")
def base_model() -> Path:
    return ROOT / "examples" / "countdown" / "base"


@pytest.fixture(scope="session")
def command():
    """Runs ``megatron-rlvr …`` in a process of its own, from the repository's root."""

    def run(*arguments: object, timeout: float = 200.0, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "megatron_rlvr", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
