"""The Triton row kernels, in processes of their own: torch and Megatron-Core change their ways where Triton is present.

``make test`` names a folder that holds Triton in ``TRITON_OTHER``. Without it, and without a Triton in this
environment, these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TRITON = os.environ.get("TRITON_OTHER", "")

pytestmark = pytest.mark.skipif(
    not TRITON and importlib.util.find_spec("triton") is None,
    reason="Triton is not installed; `make test` installs it beside the environment and sets TRITON_OTHER",
)


def run_checks(cache: Path, *files: str, **environment: str) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH"), str(Path(TRITON).resolve())]))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            *(str(HERE / file) for file in files),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_the_arithmetic_in_the_interpreter(tmp_path: Path):
    run_checks(tmp_path, "triton_rows_checks.py", "triton_api_checks.py", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_arithmetic_on_the_device(tmp_path: Path):
    run_checks(tmp_path, "triton_rows_checks.py", "triton_api_checks.py")


def test_every_launch_compiles_for_hopper_without_spills(tmp_path: Path):
    run_checks(tmp_path, "triton_compile_checks.py")
