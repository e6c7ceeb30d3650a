"""Ways for buckets to reach a server: files that it reads, or tensors in the request itself."""

from __future__ import annotations

import pickle
import shutil
import threading
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.multiprocessing import reductions

from megatron_rlvr.rollout.resync.buckets import Bucket
from megatron_rlvr.rollout.sglang.client import SGLangClient, SGLangError

# Of `torch.multiprocessing.reductions.rebuild_cuda_tensor`.
_DEVICE_ARGUMENT = 6


class Link(Protocol):
    """The way to one server. Every method raises RLVRError, RuntimeError or OSError when it fails."""

    def open(self) -> None:
        """Get ready for the buckets of one resync, whatever an earlier one left behind at the server."""
        ...

    def send(self, bucket: Bucket) -> None:
        """Bring over one bucket; returns once the server has taken it and the memory may be reused."""
        ...

    def finish(self) -> None:
        """All buckets were sent: return once the server has loaded them."""
        ...

    def close(self, *, tell: bool) -> None:
        """Give up what this process holds for the server, and ``tell`` it to do so too; no method may follow."""
        ...


class Transport(Protocol):
    """Makes links; one transport serves all servers of a fleet."""

    def link(self, client: SGLangClient) -> Link:
        """A new link to the server of ``client``."""
        ...


def begin_session(client: SGLangClient) -> None:
    """Open a weight-update session, closing first one that a transfer left open when it broke off."""
    try:
        client.begin_weight_update()
    except SGLangError as error:
        if error.status != 400:
            raise
        try:
            client.end_weight_update()
        except SGLangError:
            raise error from None
        client.begin_weight_update()


class TensorTransport:
    """Tensors inside the request: by value from CPU memory, as CUDA IPC handles from a GPU of the same host.

    CUDA IPC is written and was not run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._packed: tuple[Bucket, bytes] | None = None

    def link(self, client: SGLangClient) -> Link:
        """See `Transport.link`."""
        return _TensorLink(self, client)

    def pack(self, bucket: Bucket, ranks: int) -> list[bytes]:
        """A pickle of ``bucket``'s tensors for each of a server's ``ranks``.

        Values are pickled once for all servers that are at this bucket. A CUDA IPC handle counts who has opened it, and
        is good for one receiver.
        """
        if bucket.flat.is_cuda:
            return [_handles(bucket) for _ in range(ranks)]
        with self._lock:
            if self._packed is None or self._packed[0] is not bucket:
                self._packed = (bucket, _values(bucket))
            return [self._packed[1]] * ranks

    def forget(self) -> None:
        """Drop the last pickle."""
        with self._lock:
            self._packed = None


class _TensorLink:
    """See `TensorTransport`."""

    def __init__(self, transport: TensorTransport, client: SGLangClient) -> None:
        self._transport = transport
        self._client = client

    def open(self) -> None:
        begin_session(self._client)

    def send(self, bucket: Bucket) -> None:
        payloads = self._transport.pack(bucket, self._client.tensor_parallel)
        self._client.update_weights_from_tensor(payloads, flush_cache=False)

    def finish(self) -> None:
        self._transport.forget()
        self._client.end_weight_update()

    def close(self, *, tell: bool) -> None:
        self._transport.forget()


def _values(bucket: Bucket) -> bytes:
    """``[(name, tensor)]``. A CPU tensor must own its memory: a view's pickle holds all that it is a view of."""
    return pickle.dumps([(name, tensor.clone()) for name, tensor in bucket.tensors().items()])


def _handles(bucket: Bucket) -> bytes:
    return pickle.dumps([(name, _Handle(tensor)) for name, tensor in bucket.tensors().items()])


class _Handle:
    """Pickles as a CUDA tensor does between processes, but names the GPU by UUID: a server may number them otherwise.

    SGLang reads both (its ``patch_torch.py``, which has the position of that argument too).
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        reduce: Any = reductions.reduce_tensor
        rebuild, arguments = reduce(self._tensor)
        before, after = arguments[:_DEVICE_ARGUMENT], arguments[_DEVICE_ARGUMENT + 1 :]
        return rebuild, (*before, str(torch.cuda.get_device_properties(self._tensor.device).uuid), *after)


class DiskTransport:
    """A directory of safetensors files that every server can read, written once for all of them."""

    def __init__(self, directory: Path) -> None:
        """Use ``directory``; what is in it is replaced by every resync."""
        self._directory = directory
        self._lock = threading.Lock()
        self._stream = ""
        self._written: set[int] = set()

    def link(self, client: SGLangClient) -> Link:
        """See `Transport.link`."""
        return _DiskLink(self, client)

    def write(self, bucket: Bucket) -> None:
        """Save ``bucket`` unless another server's link has done so; the first of a stream empties the directory."""
        with self._lock:
            if bucket.stream != self._stream:
                shutil.rmtree(self._directory, ignore_errors=True)
                self._directory.mkdir(parents=True)
                self._stream, self._written = bucket.stream, set()
            if bucket.number not in self._written:
                path = self._directory / f"model-{bucket.number:05d}.safetensors"
                try:
                    save_file(bucket.tensors(), path, metadata={"format": "pt"})
                except SafetensorError as error:
                    raise OSError(f"{path} cannot be written: {error}") from error
                self._written.add(bucket.number)

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self._directory


class _DiskLink:
    """See `DiskTransport`."""

    def __init__(self, transport: DiskTransport, client: SGLangClient) -> None:
        self._transport = transport
        self._client = client

    def open(self) -> None:
        pass

    def send(self, bucket: Bucket) -> None:
        self._transport.write(bucket)

    def finish(self) -> None:
        self._client.update_weights_from_disk(str(self._transport.directory), flush_cache=False)

    def close(self, *, tell: bool) -> None:
        pass
