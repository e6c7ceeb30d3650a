"""Runs the ranks of a training over and over, each life ended by SIGKILL where the test asks for it.

A process of its own: it imports Megatron-Core once and forks the ranks of every life, which takes a second instead of
ten. One JSON request per line of standard input, one reply per line of standard output; it ends with its input.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_rlvr.policy import cpu_runtime

cpu_runtime.install()

from megatron_rlvr.config import load_config  # noqa: E402
from megatron_rlvr.policy import checkpoint as policy_checkpoint  # noqa: E402
from megatron_rlvr.policy.policy import Policy  # noqa: E402
from megatron_rlvr.report import recorder  # noqa: E402
from megatron_rlvr.rollout import EmbeddedEngine  # noqa: E402
from megatron_rlvr.training import run_directory, worker  # noqa: E402
from megatron_rlvr.training.trainer import Trainer  # noqa: E402
from megatron_rlvr.verify import VerifierClient  # noqa: E402


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Death:
    """Arms a kill for one step of this rank: the first time that step comes by the place, nothing runs after it."""

    def __init__(self, place: str, step: int) -> None:
        self._step, self._now = step, -1
        train_step = Trainer._train_step

        def noted(trainer: Trainer) -> None:
            self._now = trainer.step
            train_step(trainer)

        Trainer._train_step = noted  # type: ignore[method-assign]
        getattr(self, f"_in_{place}")()

    @property
    def _due(self) -> bool:
        return self._now == self._step

    def _after(self, owner: Any, name: str) -> None:
        """The work is done and its result is lost."""
        work: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(work)
        def last(*args: Any, **kwargs: Any) -> Any:
            result = work(*args, **kwargs)
            if self._due:
                die()
            return result

        setattr(owner, name, last)

    def _in_rollout(self) -> None:
        self._after(EmbeddedEngine, "generate")  # of the first of its prompts

    def _in_verify(self) -> None:
        self._after(VerifierClient, "verify")

    def _in_prepare(self) -> None:
        self._after(Policy, "log_probs")

    def _in_update(self) -> None:
        self._after(Policy, "update")  # the first of two

    def _in_resync(self) -> None:
        """Half of the weights have arrived."""
        resync = EmbeddedEngine.resync

        def half(tensors: Iterator[Any]) -> Iterator[Any]:
            for place, item in enumerate(tensors):
                if self._due and place == 17:
                    die()
                yield item

        EmbeddedEngine.resync = lambda engine, tensors, version: resync(engine, half(tensors), version)  # type: ignore[method-assign, assignment]

    def _in_report(self) -> None:
        """Half of the line is on the disk."""
        append = recorder.append_record

        def torn(path: Path, record: Any) -> None:
            if self._due:
                line = json.dumps(record)
                with path.open("a") as file:
                    file.write(line[: len(line) // 2])
                die()
            append(path, record)

        recorder.append_record = torn  # type: ignore[assignment]

    def _in_saving(self) -> None:
        """Weights and optimizer are being written, into a directory that no one takes for a checkpoint yet."""
        self._after(policy_checkpoint.dist_checkpointing, "save")

    def _in_commit(self) -> None:
        self._after(run_directory, "_write_manifest")

    def _in_pruning(self) -> None:
        """The new checkpoint is committed, the old one half removed."""

        commit = run_directory.RunDirectory.commit_checkpoint
        self._saved = False

        def noted(directory: Any, step: int, kept: int) -> None:
            self._saved = True
            commit(directory, step, kept)

        run_directory.RunDirectory.commit_checkpoint = noted  # type: ignore[method-assign]

        class Half:
            @staticmethod
            def rmtree(path: Path, ignore_errors: bool = False) -> None:
                if self._due and self._saved and path.exists():
                    shutil.rmtree(path / "policy")
                    die()
                shutil.rmtree(path, ignore_errors=ignore_errors)

        run_directory.shutil = Half  # type: ignore[assignment]


def rank(number: int, port: int, request: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(request["ranks"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if request["kill"] is not None and request["kill"]["rank"] == number:
        Death(request["kill"]["place"], request["kill"]["step"])
    code = 1
    try:
        code = worker.run_rank(load_config(request["config"], request["overrides"]))
    except Exception:  # noqa: BLE001 - the end of a process
        traceback.print_exc()
    finally:
        os._exit(code)


def live(request: dict[str, Any]) -> tuple[int, int]:
    """The first rank that ended and its exit code; with it ends the life of all others, unless it ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for number in range(request["ranks"]):
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # the ranks end with this process
            rank(number, port, request)
        children[child] = number
    first = None
    while children:
        child, status = os.wait()
        if child not in children:
            continue
        number, code = children.pop(child), os.waitstatus_to_exitcode(status)
        if first is None or (first[1] == 0 and code != 0):
            first = (number, code)
            for other in children if code else ():
                os.kill(other, signal.SIGKILL)
    assert first is not None
    return first


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for a reply
    for line in sys.stdin:
        print(json.dumps(live(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
