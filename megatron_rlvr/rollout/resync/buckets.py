"""A stream of tensors as flat buckets of bounded size."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_rlvr.rollout.engine import NamedTensors


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Some consecutive tensors of a stream, in one piece of memory.

    Attributes:
        stream: Distinguishes the stream from every other.
        number: Position among the stream's buckets, from 0.
        names: Hugging Face names.
        shapes: Their shapes.
        dtype: The dtype of all of them.
        flat: Their bytes one after the other, ``uint8``.
    """

    stream: str
    number: int
    names: list[str]
    shapes: list[torch.Size]
    dtype: torch.dtype
    flat: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, as views of `flat`."""
        sizes = [math.prod(shape) * self.dtype.itemsize for shape in self.shapes]
        pieces = torch.split(self.flat, sizes)
        return {
            name: piece.view(self.dtype).view(shape)
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }


def fill_buckets(tensors: NamedTensors, size: int) -> Iterator[Bucket]:
    """Copy ``tensors``, all of one dtype, into buckets.

    Args:
        tensors: Names and full tensors.
        size: Most bytes of a bucket; a larger tensor gets one to itself.

    Yields:
        The buckets; each is filled only when asked for, and has memory of its own.
    """
    stream = uuid.uuid4().hex
    number, names, shapes, used = 0, list[str](), list[torch.Size](), 0
    flat = torch.empty(0, dtype=torch.uint8)
    dtype = torch.float32
    for name, tensor in tensors:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if names and used + len(data) > len(flat):
            yield Bucket(stream, number, names, shapes, dtype, flat[:used])
            number, names, shapes, used = number + 1, [], [], 0
        if not names:
            flat = torch.empty(max(size, len(data)), dtype=torch.uint8, device=data.device)
            dtype = tensor.dtype
        flat[used : used + len(data)] = data
        names.append(name)
        shapes.append(tensor.shape)
        used += len(data)
    if names:
        yield Bucket(stream, number, names, shapes, dtype, flat[:used])
