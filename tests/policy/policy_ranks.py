"""Runs functions of ``policy_jobs`` on several gloo ranks, for tests that stay free of Megatron-Core themselves.

Importing Megatron-Core takes seconds, forking a process that has it takes milliseconds. So there is one nursery process
per version of Megatron-Core: it imports everything once and forks the ranks of every job. It ends when its standard
input closes, that is at the latest when the tests' own process ends, however that happens.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

_JOB_SECONDS = 150.0  # a job takes a few seconds; what hangs is ended here
_PACKAGE_ROOT = Path(__file__).parents[2]


class Nursery:
    """The tests' end of a nursery process."""

    def __init__(self, megatron_core: str | None) -> None:
        """Start the process.

        Args:
            megatron_core: Folder with the Megatron-Core to use, or None for the installed one.
        """
        roots = [megatron_core and str(Path(megatron_core).resolve()), str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(root for root in roots if root),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def run(self, job: str, ranks: int, **arguments: Any) -> list[Any]:
        """What ``policy_jobs.<job>(**arguments)`` returned on each of ``ranks`` ranks.

        Args:
            job: Name of the function; one of another module than ``policy_jobs`` comes with that module's name.
            ranks: How many processes call it together.
            arguments: JSON values.

        Raises:
            AssertionError: With the traceback of the rank that failed, or if the job did not end in time.
        """
        with tempfile.TemporaryDirectory(prefix="policy-ranks-") as folder:
            request = {"job": job, "ranks": ranks, "folder": folder, "arguments": arguments}
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], _JOB_SECONDS)
            if not ready:
                self.close()
                raise AssertionError(f"{job} on {ranks} ranks did not end within {_JOB_SECONDS} s")
            error = json.loads(self._process.stdout.readline() or '"the nursery process ended"')
            assert error is None, error
            return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]

    def close(self) -> None:
        """End the process and whatever it forked."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@functools.cache
def nursery(megatron_core: str | None = None) -> Nursery:
    """The nursery of one version of Megatron-Core, started when first asked for."""
    started = Nursery(megatron_core)
    atexit.register(started.close)
    return started


def run_ranks(job: str, ranks: int, **arguments: Any) -> list[Any]:
    """`Nursery.run` with the installed Megatron-Core."""
    return nursery().run(job, ranks, **arguments)


def _rank(rank: int, request: dict[str, Any]) -> None:
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["ranks"])}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{request['folder']}/store",
        rank=rank,
        world_size=request["ranks"],
        timeout=timedelta(seconds=_JOB_SECONDS),
    )
    module, _, name = request["job"].rpartition(".")
    job = getattr(importlib.import_module(module or "policy_jobs"), name)
    torch.save(job(**request["arguments"]), Path(request["folder"]) / f"rank{rank}.pt")


def _serve() -> None:
    """The nursery process: one request per line of standard input, one reply per line of standard output."""
    from torch.multiprocessing.spawn import ProcessException, start_processes

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for a reply
    importlib.import_module("policy_jobs")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            start_processes(_rank, (request,), nprocs=request["ranks"], start_method="fork")  # type: ignore[no-untyped-call]
            error = None
        except ProcessException as failure:
            error = str(failure)
        print(json.dumps(error), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
