"""New weights for a whole fleet: the gather feeds one transaction per server, and each server's outcome is its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

from megatron_rlvr.core import RLVRError
from megatron_rlvr.rollout.engine import NamedTensors
from megatron_rlvr.rollout.resync.buckets import fill_buckets
from megatron_rlvr.rollout.resync.manifest import Manifest, ModelShape, Served
from megatron_rlvr.rollout.resync.transaction import Stage, Transaction
from megatron_rlvr.rollout.resync.transports import Link, Transport
from megatron_rlvr.rollout.sglang.client import SGLangError
from megatron_rlvr.rollout.sglang.engines import EngineState, FleetEngine
from megatron_rlvr.rollout.sglang.fleet import SGLangFleet

BUCKET_BYTES = 256 * 2**20
# A server that is out and does not even answer this fast keeps nobody waiting.
_PROBE_TIMEOUT_S = 3.0

_log = logging.getLogger(__name__)


class Resync:
    """The ``sync`` of an `SGLangFleet`.

    At most three buckets exist at a time: one being filled, one waiting, one on the wire. Servers that are out take
    part whenever they answer, and serve again once their weights are verified; our own are restarted first.
    """

    def __init__(
        self,
        directory: str | Path,
        transport: Transport,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        pause: Literal["abort", "retract"] = "abort",
        patience_s: float = 30.0,
    ) -> None:
        """Settle how weights travel.

        Args:
            directory: Model directory; its ``config.json`` says how servers shard the weights.
            transport: The way.
            bucket_bytes: Most bytes of weights in one bucket.
            pause: What becomes of running requests: they end (abort), or go on with the new weights (retract).
            patience_s: How long a server may take to let go of running requests, and for a first token, seconds.
        """
        self._shape = ModelShape.read(directory)
        self._transport = transport
        self._bucket_bytes = bucket_bytes
        self._pause: Literal["abort", "retract"] = pause
        self._patience_s = patience_s
        self._links: dict[FleetEngine, Link] = {}
        self._restarted: set[FleetEngine] = set()

    def close(self) -> None:
        """Leave all process groups."""
        for link in self._links.values():
            link.close(tell=True)
        self._links.clear()

    def __call__(self, fleet: SGLangFleet, tensors: NamedTensors, version: int) -> None:
        """Bring every server that answers to ``version``; who fails is deregistered with the reason, and is out.

        ``tensors`` is read to its end whatever the servers do, as reading it is collective over the trainer's ranks.
        The same version may be resynced again at any time.

        Args:
            fleet: The servers.
            tensors: Hugging Face names and full tensors; each is used before the next is asked for.
            version: Version of the weights, not negative.

        Raises:
            RLVRError: If the tensors cannot be read or not be split over a server's ranks, or a server cannot retract.
        """
        if self._pause == "retract":
            _check_retract(fleet.engines)
        with ThreadPoolExecutor(max(len(fleet.engines), 1), thread_name_prefix="resync") as pool:
            served = {
                engine: facts
                for engine, facts in zip(
                    fleet.engines, pool.map(lambda engine: self._begin(fleet, engine), fleet.engines), strict=True
                )
                if facts is not None
            }
            served = self._of_one_dtype(fleet, served)
            manifests = {facts: Manifest(self._shape, facts) for facts in set(served.values())}
            transactions = {
                engine: self._transaction(engine, manifests[facts], version) for engine, facts in served.items()
            }
            outcomes = {
                engine: pool.submit(self._conclude, fleet, engine, transaction)
                for engine, transaction in transactions.items()
            }
            try:
                self._feed(tensors, list(manifests.values()), list(transactions.values()))
            except BaseException:
                for transaction in transactions.values():
                    transaction.cancel()
                raise
            for outcome in outcomes.values():
                outcome.result()

    def _begin(self, fleet: SGLangFleet, engine: FleetEngine) -> Served | None:
        """How ``engine`` holds the model; None if it takes no part this time."""
        if engine.state is EngineState.OUT and not self._answers(engine):
            return None
        try:
            return Served.ask(engine.client, self._shape)
        except SGLangError as error:
            self._drop(fleet, engine, f"{Stage.BEGIN}: {error}")
            return None

    def _answers(self, engine: FleetEngine) -> bool:
        """Whether a server that is out may be tried; one of ours that does not is restarted for the next time."""
        try:
            engine.client.health(_PROBE_TIMEOUT_S)
            return True
        except SGLangError as error:
            starting = engine.process is not None and engine.process.alive and engine in self._restarted
            if not starting:
                _log.info("SGLang engine %s stays out: %s", engine.client.url, error)
                self._restart(engine)
            return False

    def _of_one_dtype(self, fleet: SGLangFleet, served: dict[FleetEngine, Served]) -> dict[FleetEngine, Served]:
        """Weights travel in the servers' dtype, so all must have the first one's; it is none of those that are out."""
        order = sorted(served, key=lambda engine: engine.state is EngineState.OUT)
        dtypes = [served[engine].dtype for engine in order]
        for engine, dtype in zip(order, dtypes, strict=True):
            if dtype is not dtypes[0]:
                fleet.deregister(engine, f"it serves {dtype} and others {dtypes[0]}; give all of them one dtype")
        return {engine: served[engine] for engine, dtype in zip(order, dtypes, strict=True) if dtype is dtypes[0]}

    def _transaction(self, engine: FleetEngine, manifest: Manifest, version: int) -> Transaction:
        if engine not in self._links:
            self._links[engine] = self._transport.link(engine.client)
        return Transaction(
            engine.client,
            self._links[engine],
            manifest,
            version,
            pause=self._pause,
            patience_s=self._patience_s,
        )

    def _feed(self, tensors: NamedTensors, manifests: Sequence[Manifest], transactions: Sequence[Transaction]) -> None:
        dtype = manifests[0].dtype if manifests else None
        for bucket in fill_buckets(_noted(tensors, manifests, dtype), self._bucket_bytes):
            for transaction in transactions:
                transaction.offer(bucket)
        for transaction in transactions:
            transaction.offer(None)

    def _conclude(self, fleet: SGLangFleet, engine: FleetEngine, transaction: Transaction) -> None:
        why = transaction.run()
        if why:
            del self._links[engine]  # it has closed itself
            self._drop(fleet, engine, why)
        elif engine.state is EngineState.OUT:
            self._restarted.discard(engine)
            fleet.readmit(engine)

    def _drop(self, fleet: SGLangFleet, engine: FleetEngine, why: str) -> None:
        fleet.deregister(engine, why)
        self._restart(engine)

    def _restart(self, engine: FleetEngine) -> None:
        if engine.process is not None:
            engine.process.start()
            self._restarted.add(engine)


def _check_retract(engines: Sequence[FleetEngine]) -> None:
    """Refuse servers that never flush while retracted requests wait; those have no sessions either."""
    for engine in engines:
        if not engine.client.sessions:
            raise RLVRError(
                f"rollout.partial=true needs SGLang 0.5.21 or newer, and {engine.client.url} is older; set it to false "
                "or give newer servers"
            )


def _noted(
    tensors: NamedTensors, manifests: Sequence[Manifest], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors in ``dtype``, every one of them entered in the manifests."""
    for name, tensor in tensors:
        converted = tensor if dtype is None else tensor.to(dtype)
        for manifest in manifests:
            manifest.add(name, converted)
        yield name, converted
