"""A verifier service of one's own, for the length of a ``with`` block."""

from __future__ import annotations

import importlib.util
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_rlvr.core import RLVRError

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 10.0

_ANNOUNCEMENT = "rlvr-sandbox listening on "


@contextmanager
def local_service() -> Iterator[str]:
    """Run the verifier service beside this process and yield its URL; it stops with the block or with this process.

    Raises:
        RLVRError: If the service is not installed or does not start.
    """
    if importlib.util.find_spec("rlvr_sandbox") is None:
        raise RLVRError(
            f"the verifier service is not installed for {sys.executable}; run 'pip install ./sandbox', "
            "or give the URL of a running one"
        )
    # The service watches the pipe to its stdin, which the kernel closes however this process dies. A session of its own
    # keeps a Ctrl-C at the terminal from stopping it while the trainer still needs verdicts to finish.
    process = subprocess.Popen(
        [sys.executable, "-m", "rlvr_sandbox", "serve", "--port", "0", "--exit-with-parent", "--drain-seconds", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield _announced_url(process)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()


def _announced_url(process: subprocess.Popen[str]) -> str:
    """The URL in the line that the service prints once it answers."""
    if process.stdout is None:
        raise ValueError("the service needs a pipe for stdout")
    ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
    if not ready:
        raise RLVRError(
            f"the verifier service did not start within {START_TIMEOUT_S:g} s; "
            "run 'python -m rlvr_sandbox serve' to see why"
        )
    line = process.stdout.readline()
    if not line.startswith(_ANNOUNCEMENT):
        raise RLVRError(
            f"the verifier service ended with status {process.wait(STOP_TIMEOUT_S)} instead of listening; "
            "see its message above, or run 'python -m rlvr_sandbox serve' to see why"
        )
    return line.removeprefix(_ANNOUNCEMENT).strip()
