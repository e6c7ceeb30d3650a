"""One server's way through a resync: pause → flush → transfer → verify → commit → continue, or out with the reason."""

from __future__ import annotations

import contextlib
import enum
import queue
import threading
import time
from typing import Any, Literal

from megatron_rlvr.core import RLVRError
from megatron_rlvr.rollout.resync.buckets import Bucket
from megatron_rlvr.rollout.resync.manifest import Manifest
from megatron_rlvr.rollout.resync.transports import Link
from megatron_rlvr.rollout.sglang.client import SGLangClient, SGLangError

# Announced from the first bucket to the commit, so that a token made by half-replaced weights gives itself away.
UNCOMMITTED = -1

_POLL_S = 0.05
_PROBE = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}


class Stage(enum.StrEnum):
    """Where a transaction is, and what failed if it ends there."""

    BEGIN = "begin"
    PAUSE = "pause"
    FLUSH = "flush"
    TRANSFER = "transfer"
    VERIFY = "verify"
    COMMIT = "commit"
    CONTINUE = "continue"
    DONE = "done"


class Transaction:
    """Brings one server to new weights; `run` in a thread of its own, fed by `offer`.

    Every stage may find the server in the middle of an earlier transaction: pausing twice, an open session and loaded
    buckets are no hindrance, so a resync that broke off anywhere is repeated as a whole.
    """

    def __init__(
        self,
        client: SGLangClient,
        link: Link,
        manifest: Manifest,
        version: int,
        *,
        pause: Literal["abort", "retract"],
        patience_s: float,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            client: Talks to the server.
            link: How the weights get there.
            manifest: What the server must hold in the end; complete once the last bucket was offered.
            version: The version to commit.
            pause: What becomes of running requests: they end (abort), or go on with the new weights (retract).
            patience_s: How long running requests may take to leave, and a first token to come, seconds.
        """
        self._client = client
        self._link = link
        self._manifest = manifest
        self._version = version
        self._pause: Literal["abort", "retract"] = pause
        self._patience_s = patience_s
        self._inbox: queue.Queue[Bucket | None] = queue.Queue(1)
        self._ended = threading.Event()
        self._cancelled = threading.Event()
        self.stage = Stage.BEGIN

    def offer(self, bucket: Bucket | None) -> None:
        """Hand over the next bucket, or None after the last, waiting for room; a transaction that ended ignores it."""
        while not self._ended.is_set():
            try:
                self._inbox.put(bucket, timeout=_POLL_S)
                return
            except queue.Full:
                continue

    def cancel(self) -> None:
        """No more buckets will come."""
        self._cancelled.set()

    def run(self) -> str:
        """Go through all stages.

        Returns:
            Why the server must not serve, naming the stage; empty if it serves the new version.
        """
        try:
            self._run()
        except (RLVRError, RuntimeError, OSError) as error:
            self._ended.set()
            self._clean_up(responsive=not (isinstance(error, SGLangError) and error.status is None))
            return f"{self.stage} of version {self._version} failed: {error}"
        finally:
            self._ended.set()
        return ""

    def _run(self) -> None:
        self.stage = Stage.PAUSE
        self._client.pause(self._pause)
        self.stage = Stage.FLUSH
        self._flush()
        self.stage = Stage.TRANSFER
        self._client.update_weight_version(UNCOMMITTED)
        self._link.open()
        while (bucket := self._next()) is not None:
            self._link.send(bucket)
        self._link.finish()
        self.stage = Stage.VERIFY
        self._manifest.check(self._client)
        self.stage = Stage.COMMIT
        self._client.update_weight_version(self._version)
        self._check_version("/model_info", self._client.model_info())
        self.stage = Stage.CONTINUE
        self._client.continue_generation()
        for sample in self._client.generate(_PROBE, self._patience_s):
            self._check_version("/generate", sample.get("meta_info"))
        self.stage = Stage.DONE

    def _flush(self) -> None:
        """Ask until it is done: a server that waits by itself waits for retracted requests too, which wait for us."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                self._client.flush_cache(0.0)
                return
            except SGLangError as error:
                if error.status != 400 or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)

    def _check_version(self, endpoint: str, reply: Any) -> None:
        announced = reply.get("weight_version") if isinstance(reply, dict) else None
        if announced != str(self._version):
            message = f"it announces weights of version {announced!r}"
            raise SGLangError(self._client.url, endpoint, 200, message)

    def _next(self) -> Bucket | None:
        while True:
            try:
                return self._inbox.get(timeout=_POLL_S)
            except queue.Empty:
                if self._cancelled.is_set():
                    raise RLVRError("the trainer stopped sending weights; see its own error") from None

    def _clean_up(self, *, responsive: bool) -> None:
        """Leave the server; one that replies also ends its requests, which are then asked of another."""
        self._link.close(tell=responsive)
        if responsive:
            with contextlib.suppress(SGLangError):
                self._client.abort_all()
