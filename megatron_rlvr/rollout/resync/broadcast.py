"""Buckets broadcast into a process group with one server's ranks: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import contextlib
import socket
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed import distributed_c10d as c10d

from megatron_rlvr.rollout.resync.buckets import Bucket
from megatron_rlvr.rollout.resync.transports import Link, begin_session
from megatron_rlvr.rollout.sglang.client import SGLangClient, SGLangError


class BroadcastTransport:
    """One process group per server, so that a dead server takes no other with it; kept from resync to resync.

    When this process dies its connections break, and with them the server's wait. NCCL is written and was not run.
    """

    def __init__(self, address: str = "127.0.0.1", *, timeout_s: float = 60.0) -> None:
        """Choose where servers find this process.

        Args:
            address: An address of this host that the servers can reach.
            timeout_s: Longest wait of this process for a server to join or to receive a bucket, seconds.
        """
        self._address = address
        self._timeout = timedelta(seconds=timeout_s)

    def link(self, client: SGLangClient) -> Link:
        """See `Transport.link`."""
        return _BroadcastLink(client, self._address, self._timeout)


class _BroadcastLink:
    """See `BroadcastTransport`."""

    def __init__(self, client: SGLangClient, address: str, timeout: timedelta) -> None:
        self._client = client
        self._address = address
        self._timeout = timeout
        self._name = ""
        self._group: dist.ProcessGroup | None = None

    def open(self) -> None:
        if self._group is None:
            self._join()
        begin_session(self._client)

    def send(self, bucket: Bucket) -> None:
        """The reply decides: a server that refuses or dies never receives, so its broadcast is not waited for."""
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(
                self._client.update_weights_from_distributed,
                bucket.names,
                [bucket.dtype] * len(bucket.names),
                bucket.shapes,
                self._name,
                "flattened_bucket",
                flush_cache=False,
            )
            work = dist.broadcast(bucket.flat, group=self._group, group_src=0, async_op=True)
            reply.result()
        if work is not None:
            work.wait()

    def finish(self) -> None:
        self._client.end_weight_update()

    def close(self, *, tell: bool) -> None:
        if self._group is None:
            return
        group, self._group = self._group, None
        dist.destroy_process_group(group)  # first: it ends a broadcast that the server still waits for
        del group
        if tell:
            with contextlib.suppress(SGLangError, RuntimeError):  # the second: the client is closed already
                self._client.destroy_weights_update_group(self._name)

    def _join(self) -> None:
        """Make the group of this process, rank 0, and the server's ranks as SGLang makes its end."""
        backend: Literal["gloo", "nccl"] = "nccl" if torch.cuda.is_available() else "gloo"
        name, port, world = f"resync-{uuid.uuid4().hex}", _free_port(self._address), 1 + self._client.tensor_parallel
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(self._client.init_weights_update_group, self._address, port, 1, world, name, backend)
            try:
                self._group = _process_group(self._address, port, world, name, backend, self._timeout)
            except RuntimeError:
                reply.result()  # says more
                raise
            self._name = name
            reply.result()


def _process_group(
    address: str, port: int, world: int, name: str, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Torch has no public way to a group beside the default one whose members are other processes.

    The store is made by hand: under torchrun ``rendezvous`` would take the trainer's own in its place.
    """
    store = TCPStore(address, port, world, is_master=True, timeout=timeout, wait_for_workers=False)
    helper: Any = c10d._new_process_group_helper
    group: dist.ProcessGroup
    group, _ = helper(
        world, 0, [], c10d.Backend(backend), c10d.PrefixStore(name, store), group_name=name, timeout=timeout
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port
