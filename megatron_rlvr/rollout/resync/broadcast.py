"""Buckets broadcast into a process group with one server's ranks: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import contextlib
import socket
import threading
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed import distributed_c10d as c10d

from megatron_rlvr.core import RLVRError
from megatron_rlvr.rollout.resync.buckets import Bucket
from megatron_rlvr.rollout.resync.transports import Link, begin_session
from megatron_rlvr.rollout.sglang.client import SGLangClient, SGLangError

Backend = Literal["gloo", "nccl"]

# NCCL's watchdog ends the whole process over an operation that outlasts its group's timeout; long before that the reply
# has ended our wait and `close` the operation.
_WATCHDOG_FACTOR = 10
# What NCCL says of two ranks on one GPU, before 2.30 and since.
_SHARED_GPU = ("Duplicate GPU detected", "NCCL_MULTI_RANK_GPU_ENABLE")


class BroadcastTransport:
    """One process group per server, so that a dead server takes no other with it; kept from resync to resync.

    When this process dies its connections break, and with them the server's wait; inside one host that is certain of
    gloo alone. NCCL is written and was not run. It refuses two ranks on one GPU: for a server that shares the trainer's
    there are `TensorTransport`, and gloo.
    """

    def __init__(self, address: str = "127.0.0.1", *, timeout_s: float = 60.0, backend: Backend | None = None) -> None:
        """Choose where servers find this process.

        Args:
            address: An address of this host that the servers can reach.
            timeout_s: Longest wait of this process for a server to join or to receive a bucket, seconds.
            backend: What carries the buckets, at both ends; None for NCCL where this process has a GPU. Gloo takes
                tensors on GPUs too, by way of the CPU.
        """
        self._address = address
        self._timeout = timedelta(seconds=timeout_s)
        self._backend: Backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")

    def link(self, client: SGLangClient) -> Link:
        """See `Transport.link`."""
        return _BroadcastLink(client, self._address, self._timeout, self._backend)


class _BroadcastLink:
    """See `BroadcastTransport`."""

    def __init__(self, client: SGLangClient, address: str, timeout: timedelta, backend: Backend) -> None:
        self._client = client
        self._address = address
        self._timeout = timeout
        self._backend = backend
        self._name = ""
        self._group: dist.ProcessGroup | None = None
        self._sending = False

    def open(self) -> None:
        if self._group is None:
            self._join()
        begin_session(self._client)

    def send(self, bucket: Bucket) -> None:
        """The reply decides: a server that refuses or dies never receives, so its broadcast is not waited for.

        NCCL's first one does not even return until the server takes part, hence a thread that may be left behind.
        """
        self._sending = True
        begun: Future[dist.Work | None] = Future()
        threading.Thread(target=_broadcast, args=(bucket.flat, self._group, begun), daemon=True).start()
        try:
            self._client.update_weights_from_distributed(
                bucket.names,
                [bucket.dtype] * len(bucket.names),
                bucket.shapes,
                self._name,
                "flattened_bucket",
                flush_cache=False,
            )
        except SGLangError as error:
            if not any(sign in error.message for sign in _SHARED_GPU):
                raise
            raise RLVRError(
                f"NCCL takes no two ranks on one GPU, and the SGLang server at {error.url} is on this process's; "
                "use rollout.transport=tensor or give it another GPU"
            ) from error
        work = begun.result(self._timeout.total_seconds())
        if work is not None:
            work.wait()
        self._sending = False

    def finish(self) -> None:
        self._client.end_weight_update()

    def close(self, *, tell: bool) -> None:
        if self._group is None:
            return
        with ThreadPoolExecutor(1) as pool:  # both ends at once: one may be waiting for the other
            told = pool.submit(self._client.destroy_weights_update_group, self._name) if tell else None
            self._leave(orderly=tell and not self._sending)
            if told is not None:
                with contextlib.suppress(SGLangError, RuntimeError):  # the second: the client is closed already
                    told.result()

    def _leave(self, *, orderly: bool) -> None:
        """End our side, and with it a broadcast that the server still waits for."""
        group, self._group = self._group, None
        if orderly or self._backend == "gloo":
            dist.destroy_process_group(group)
        else:  # destroying would wait for a broadcast that nobody receives
            c10d._abort_process_group(group)

    def _join(self) -> None:
        """Make the group of this process, rank 0, and the server's ranks as SGLang makes its end."""
        name, port, world = f"resync-{uuid.uuid4().hex}", _free_port(self._address), 1 + self._client.tensor_parallel
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(
                self._client.init_weights_update_group, self._address, port, 1, world, name, self._backend
            )
            try:
                self._group = _process_group(self._address, port, world, name, self._backend, self._timeout)
            except RuntimeError:
                reply.result()  # says more
                raise
            self._name = name
            reply.result()


def _broadcast(flat: torch.Tensor, group: dist.ProcessGroup | None, begun: Future[dist.Work | None]) -> None:
    try:
        begun.set_result(dist.broadcast(flat, group=group, group_src=0, async_op=True))
    except (RuntimeError, ValueError) as error:  # the second: the group was left meanwhile
        begun.set_exception(error)


def _process_group(
    address: str, port: int, world: int, name: str, backend: Backend, timeout: timedelta
) -> dist.ProcessGroup:
    """Torch has no public way to a group beside the default one whose members are other processes.

    The store is made by hand: under torchrun ``rendezvous`` would take the trainer's own in its place.
    """
    store = TCPStore(address, port, world, is_master=True, timeout=timeout, wait_for_workers=False)
    helper: Any = c10d._new_process_group_helper
    group: dist.ProcessGroup
    longest = timeout if backend == "gloo" else timeout * _WATCHDOG_FACTOR
    group, _ = helper(
        world, 0, [], c10d.Backend(backend), c10d.PrefixStore(name, store), group_name=name, timeout=longest
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port
