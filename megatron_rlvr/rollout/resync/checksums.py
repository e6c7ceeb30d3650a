"""SGLang's two checksums of a tensor, computed on our side: `/weights_checker` answers with one of them."""

from __future__ import annotations

import hashlib

import torch

_LOW_32 = 2**32 - 1
_LOW_64 = 2**64 - 1
_TILE_WORDS = 8192
_TILES_AT_ONCE = 128  # keeps the 64-bit intermediates at some MiB, whatever the tensor
_SEED = 0x243F6A88
# Per half of the result: seed, multiplier and rotation of a word's position.
_HALVES = (
    (_SEED, 0x27D4EB2D, 15),
    ((_SEED * 0x9E3779B1 ^ 0xDEADBEEF) & _LOW_32, 0x165667B1, 13),
)


def cpu_checksum(tensor: torch.Tensor) -> str:
    """What a server on CPUs reports: the first 8 bytes of SHA-256 over the tensor's bytes, as 16 hexadecimal digits."""
    return hashlib.sha256(_bytes(tensor.cpu()).numpy().data).hexdigest()[:16]


def cuda_checksum(tensor: torch.Tensor) -> str:
    """What a server on CUDA reports, computed on whatever device ``tensor`` is on.

    Every 32-bit word is mixed with its position (the finaliser of MurmurHash3), words are added up by tile of 8192, and
    tiles by a sum modulo 2^64: SGLang's ``gpu_tensor_hash``, equal in 0.5.17 and 0.5.23.
    """
    data = _bytes(tensor)
    words = torch.nn.functional.pad(data, (0, -len(data) % 4)).view(torch.int32)
    if not len(words):
        return f"{0:016x}"
    total = 0
    step = _TILE_WORDS * _TILES_AT_ONCE
    for start in range(0, len(words), step):
        total += _sum_of_tiles(words[start : start + step].to(torch.int64) & _LOW_32, start, 4 * len(words))
    return f"{_final_mix(total & _LOW_64):016x}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _sum_of_tiles(words: torch.Tensor, start: int, total_bytes: int) -> int:
    """The sum of the 64-bit hashes of whole tiles, ``words`` being 32-bit values from word ``start`` on."""
    position = torch.arange(start, start + len(words), device=words.device) & _LOW_32
    halves = []
    for seed, multiplier, turn in _HALVES:
        rotated = ((position << turn) | (position >> (32 - turn))) & _LOW_32
        mixed = _mix(words ^ ((position * multiplier + seed) & _LOW_32) ^ rotated)
        tiles = torch.nn.functional.pad(mixed, (0, -len(mixed) % _TILE_WORDS)).reshape(-1, _TILE_WORDS)
        halves.append(_mix((tiles.sum(1) & _LOW_32) ^ (total_bytes & _LOW_32)))
    return sum(high << 32 | low for high, low in zip(halves[0].tolist(), halves[1].tolist(), strict=True))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser; the products overflow 64 bits and only their low half counts."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _LOW_32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _LOW_32
    return x ^ (x >> 16)


def _final_mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _LOW_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _LOW_64
    return x ^ (x >> 31)
