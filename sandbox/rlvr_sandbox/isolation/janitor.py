"""Who tidies up behind the service, however that ends: a process that waits for its end and outlives it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

from rlvr_sandbox.isolation import cgroups, delegation, proctree, workdir
from rlvr_sandbox.isolation.hierarchies import Places
from rlvr_sandbox.isolation.openwalls import LEADER

_BOOT = "import sys; sys.path[:] = {path!r}; from rlvr_sandbox.isolation.janitor import main; main(sys.argv[1])"
_CLOSED = b"closed"
_PATIENCE_S = 10.0
_TICK_S = 0.02


class Janitor:
    """The service's handle on the process that will remove ``root``, and the cgroups that are named after it."""

    def __init__(self, root: str, places: Places | None) -> None:
        """Start it.

        Args:
            root: The directory of the service's slots; its name begins the names of their cgroups.
            places: Where those cgroups are, if any.
        """
        self._root = root
        self._places = places
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        places = asdict(self._places) if self._places else None
        facts = json.dumps({"service": os.getpid(), "root": self._root, "places": places})
        command = [
            sys.executable,
            "-s",
            "-S",
            "-P",
            "-c",
            _BOOT.format(path=[path for path in sys.path if path]),
            facts,
        ]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)

    def check(self) -> None:
        """Start another one where somebody killed it."""
        if self._process.poll() is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process = self._start()

    def close(self) -> None:
        """Have everything removed now that no slot is left; returns once that is done."""
        try:
            self._process.communicate(_CLOSED, timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:  # Somebody has stopped it.
            self._process.kill()
            self._process.communicate()
        if os.path.exists(self._root):
            clean(self._root, self._places)
        if self._places is not None:
            delegation.leave(self._places)


def clean(root: str, places: Places | None) -> None:
    """Kill what may still run, remove its cgroups, then the directory ``root``; what resists is tried for a while."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            _kill_groups(root)
            gone = places is None or cgroups.sweep(places, own=os.path.basename(root))
            if gone and os.path.exists(root):
                for slot in os.listdir(root):
                    workdir.remove(os.path.join(root, slot))
                os.rmdir(root)
        except OSError:  # Somebody who is being killed still writes there.
            gone = False
        if gone or time.monotonic() > end:
            return
        time.sleep(_TICK_S)


def _kill_groups(root: str) -> None:
    """Kill the process groups that outlive their zygotes."""
    for slot in os.listdir(root) if os.path.exists(root) else ():
        with contextlib.suppress(FileNotFoundError), open(os.path.join(root, slot, LEADER)) as file:
            proctree.kill_group(int(file.read() or 0))


def main(facts: str) -> None:
    """Wait for the end of the service, tidy up."""
    config = json.loads(facts)
    places = Places(**config["places"]) if config["places"] else None
    # Who ends the service by its group or its cgroup must not end us first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    words = b""
    while part := os.read(0, 64):
        words += part
    # The kernel closes a dying process's files first; only then it kills what asked to die with it.
    while words != _CLOSED and os.getppid() == config["service"]:
        time.sleep(_TICK_S)
    clean(config["root"], places)
    if places is not None:
        delegation.leave(places)
