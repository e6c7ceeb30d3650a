"""Runs one command for a parent process, and ends it with everything it started once either of the two is gone.

A program of its own, of the standard library alone, because the other ways fail a trainer: ``PR_SET_PDEATHSIG`` follows
the *thread* that started the child, and a pipe stays open in processes that were forked meanwhile.

Usage: ``python supervisor.py PARENT_PID SCRATCH_DIRECTORY COMMAND …``
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from types import FrameType

POLL_S = 0.2
_PR_SET_PDEATHSIG = 1


def main(parent: int, scratch: str, command: list[str]) -> int:
    """Wait for the end of ``command``, of process ``parent``, or of patience (SIGTERM); leave nothing behind.

    Args:
        parent: Process that the command must not outlive; this one's parent.
        scratch: Directory removed at the end.
        command: Program and arguments; it gets a session, hence a process group, of its own.

    Returns:
        The exit status of the command, as in `subprocess.Popen.returncode`.
    """
    asked_to_stop = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_parent)
    while child.poll() is None and os.getppid() == parent and not asked_to_stop:
        time.sleep(POLL_S)
    status = child.poll()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # a server keeps nothing that would need a gentler end
    child.wait()
    shutil.rmtree(scratch, ignore_errors=True)
    return child.returncode if status is None else status


def _end_with_parent() -> None:
    """For the case that this program is killed; here it is safe, as it has one thread."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    status = main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
    sys.exit(status if status >= 0 else 128 - status)
