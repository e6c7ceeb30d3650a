"""What every rank of a server must hold after a resync, as the checksums that the server itself reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rlvr.core import RLVRError
from megatron_rlvr.rollout.resync.checksums import cpu_checksum, cuda_checksum
from megatron_rlvr.rollout.sglang.client import SGLangClient, SGLangError

# SGLang concatenates these along their rows; a rank's parameter holds its share of each, in this order.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_FUSED_INTO = {part: fused for fused, parts in _FUSED.items() for part in parts}
_BY_COLUMNS = frozenset({"o_proj", "down_proj"})
_BY_VOCABULARY = frozenset({"embed_tokens", "lm_head"})
_FEED_FORWARD = frozenset({"gate_proj", "up_proj", "down_proj"})
# What SGLang pads by zeros: the vocabulary everywhere, the feed-forward width on CPUs, there per rank.
_VOCABULARY_STEP = 64
_CPU_FEED_FORWARD_STEP = 32
_SHOWN = 2


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model's ``config.json`` decides how a server shards it.

    Attributes:
        kv_heads: Key/value heads; more ranks than these hold copies.
        tied: Whether the output layer is the embedding.
        dtype: As the file names it.
    """

    kv_heads: int
    tied: bool
    dtype: str

    @classmethod
    def read(cls, directory: str | Path) -> ModelShape:
        """The shape of the model in ``directory``."""
        config = json.loads((Path(directory) / "config.json").read_text())
        return cls(
            kv_heads=int(config.get("num_key_value_heads") or config["num_attention_heads"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )


@dataclass(frozen=True, slots=True)
class Served:
    """How a server holds the model.

    Attributes:
        ranks: Tensor-parallel ranks.
        dtype: Type of its weights.
        cuda: Whether they are on GPUs, where it computes another checksum.
    """

    ranks: int
    dtype: torch.dtype
    cuda: bool

    @classmethod
    def ask(cls, client: SGLangClient, shape: ModelShape) -> Served:
        """Ask the server behind ``client``.

        Raises:
            SGLangError: If it does not answer, or shards or quantises in a way that no manifest can be made for.
        """
        facts = client.server_info()
        for key, fitting in (("dp_size", (1, None)), ("pp_size", (1, None)), ("quantization", (None, ""))):
            if facts.get(key) not in fitting:
                message = f"it runs with {key}={facts[key]}, for which weights cannot be verified; start it without"
                raise SGLangError(client.url, "/server_info", 200, message)
        ranks, name = facts.get("tp_size"), str(facts.get("dtype", "auto"))
        if name == "auto":
            name = "float16" if shape.dtype == "float32" else shape.dtype
        dtype = getattr(torch, name, None)
        if not isinstance(ranks, int) or not isinstance(dtype, torch.dtype):
            message = f"tp_size={ranks} and dtype={name} do not say how it holds the model"
            raise SGLangError(client.url, "/server_info", 200, message)
        return cls(ranks, dtype, facts.get("device", "cuda") == "cuda")


class Manifest:
    """Checksums of every parameter of every rank, from Hugging Face tensors as they stream by (Qwen2, Qwen3, Llama).

    A fused parameter is hashed once its parts have come, so no more than one layer's parts are kept alive.
    """

    def __init__(self, shape: ModelShape, served: Served) -> None:
        """Start empty.

        Args:
            shape: The model.
            served: How the server holds it.
        """
        self._shape = shape
        self._served = served
        self._checksum = cuda_checksum if served.cuda else cpu_checksum
        self._parts: dict[str, dict[str, torch.Tensor]] = {}
        self._expected: list[dict[str, str]] = [{} for _ in range(served.ranks)]

    @property
    def dtype(self) -> torch.dtype:
        """What tensors must be converted to before `add`."""
        return self._served.dtype

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take the full tensor called ``name``, already of the server's dtype.

        Raises:
            RLVRError: If the server cannot split it over its ranks.
        """
        *path, module, kind = name.split(".")
        fused = _FUSED_INTO.get(module)
        if fused is None:
            if not (module == "lm_head" and self._shape.tied):
                self._enter(name, [(module, tensor)])
            return
        target = ".".join([*path, fused, kind])
        parts = self._parts.setdefault(target, {})
        parts[module] = tensor
        if len(parts) == len(_FUSED[fused]):
            self._enter(target, [(part, parts[part]) for part in _FUSED[fused]])
            del self._parts[target]

    def check(self, client: SGLangClient) -> None:
        """Compare with what every rank of the server reports.

        Raises:
            SGLangError: If a rank holds anything else, or the server cannot tell.
        """
        try:
            reported = client.checksums()
        except SGLangError as error:
            if error.status is None:
                raise
            message = f"{error.message} (nothing is proved without; on CPU that takes SGLang 0.5.21 or newer)"
            raise SGLangError(error.url, error.endpoint, error.status, message) from None
        if trouble := self.differences(reported):
            raise SGLangError(client.url, "/weights_checker", 200, trouble)

    def differences(self, reported: Sequence[dict[str, str]]) -> str:
        """How ``reported``, one mapping a rank, differs from what is expected; empty if it does not."""
        if self._parts:
            target, parts = next(iter(self._parts.items()))
            return f"of {target} only {sorted(parts)} were sent"
        if len(reported) != len(self._expected):
            return f"{len(reported)} ranks reported checksums, expected {len(self._expected)}"
        for rank, (expected, found) in enumerate(zip(self._expected, reported, strict=True)):
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            if wrong:
                more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
                return f"rank {rank} holds other weights than were sent in {', '.join(wrong[:_SHOWN])}{more}"
        return ""

    def _enter(self, name: str, parts: list[tuple[str, torch.Tensor]]) -> None:
        for rank, expected in enumerate(self._expected):
            shards = [self._shard(module, tensor, rank) for module, tensor in parts]
            expected[name] = self._checksum(shards[0] if len(shards) == 1 else torch.cat(shards))

    def _shard(self, module: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """What of a full tensor rank ``rank`` holds."""
        ranks = self._served.ranks
        if module in _BY_VOCABULARY:
            step = _VOCABULARY_STEP
            return _padded_share(
                tensor, rank, ranks, step if _round_up(len(tensor), step) % ranks == 0 else step * ranks
            )
        if module in ("k_proj", "v_proj") and self._served.cuda:
            holders = min(ranks, self._shape.kv_heads)
            return _share(tensor, rank * holders // ranks, holders)
        if module in ("q_proj", "k_proj", "v_proj"):
            return _share(tensor, rank, ranks)
        by_columns = module in _BY_COLUMNS and tensor.dim() == 2
        rows = tensor.T if by_columns else tensor
        if module in _FEED_FORWARD and not self._served.cuda:
            own = _padded_share(rows, rank, ranks, _CPU_FEED_FORWARD_STEP * ranks)
        elif by_columns or module in _FUSED_INTO:
            own = _share(rows, rank, ranks)
        else:
            return tensor
        return own.T if by_columns else own


def _share(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    if len(tensor) % ranks:
        raise RLVRError(
            f"rollout.sglang.tp_size={ranks} does not divide a dimension of {len(tensor)} of the model's weights; "
            "choose a divisor"
        )
    return _padded_share(tensor, rank, ranks, ranks)


def _padded_share(tensor: torch.Tensor, rank: int, ranks: int, step: int) -> torch.Tensor:
    """One rank's rows after zero rows filled them up to a multiple of ``step``."""
    rows = _round_up(len(tensor), step) // ranks
    own = tensor[rank * rows : (rank + 1) * rows]
    return torch.nn.functional.pad(own, (*(0, 0) * (own.dim() - 1), 0, rows - len(own)))


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
