"""A server of real, sharded weights that speaks SGLang's schema and fails where it is told to.

Its loader copies Hugging Face tensors into each rank's parameters as SGLang's does; it shares no code with ours.
"""

from __future__ import annotations

import base64
import hashlib
import pickle
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from scripted_sglang import DropConnection, ScriptedServer

RANKS = 2
FAULTS = ("error", "refusal", "hang", "reset", "death", "late", "ignored", "corrupt", "stale rank")
# Where in a resync: the stage and the endpoint that stands for it.
PLACES = {
    "begin": "/server_info",
    "pause": "/pause_generation",
    "flush": "/flush_cache",
    "open session": "/begin_weight_update",
    "transfer": "/update_weights_from_tensor",
    "close session": "/end_weight_update",
    "verify": "/weights_checker",
    "commit": "/update_weight_version",
    "continue": "/continue_generation",
    "first token": "/generate",
}
_REPLIES: Mapping[str, tuple[int, Any]] = {
    "error": (500, {"success": False, "message": "scripted"}),
    "refusal": (200, {"success": False, "message": "scripted"}),
    "ignored": (200, {"success": True, "message": "done"}),
}


class FaultyServer(ScriptedServer):
    """TP=2 on CPUs; ``fault`` strikes at ``place``. Neither healthy replies nor weights are scripted."""

    def __init__(self, weights: Mapping[str, torch.Tensor], *, hang_s: float = 2.5) -> None:
        super().__init__(version="default")
        self.paths |= {"/end_weight_update": {}, "/abort_request": {}}
        self.place = self.fault = ""
        self.dead = False
        self._hang_s = hang_s
        self._running = threading.Event()
        self._running.set()
        self._session = False
        self._lock = threading.Lock()
        self._parameters: list[dict[str, torch.Tensor]] = [{} for _ in range(RANKS)]
        self._load(weights, range(RANKS))

    def fingerprint(self) -> float:
        """Stands for the log-probs that these weights give: other weights, another number."""
        return -int(hashlib.sha256(repr(self._checksums()).encode()).hexdigest()[:8], 16) / 2**32 - 0.001

    def replace_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Hold other weights than the last transfer brought."""
        self._load(weights, range(RANKS))

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if self.dead:
            raise DropConnection
        uncommitted = path == "/update_weight_version" and body["new_version"].startswith("-")
        if path != self.place or uncommitted:
            return self._act(path, body, range(RANKS))
        if self.fault in ("reset", "death", "hang"):
            self.dead = self.fault == "death"
            time.sleep(self._hang_s * (self.fault == "hang"))
            raise DropConnection
        if self.fault in _REPLIES:
            if (path, self.fault) == ("/flush_cache", "refusal"):
                return 400, "requests are running"  # the one endpoint that answers in plain text
            return _REPLIES[self.fault]
        reply = self._act(path, body, range(1 if self.fault == "stale rank" else RANKS))
        time.sleep(self._hang_s * (self.fault == "late"))
        if self.fault == "corrupt":
            self.place = ""
            next(iter(self._parameters[0].values())).view(torch.uint8).view(-1)[5] ^= 1
        return reply

    def _act(self, path: str, body: Any, ranks: range) -> tuple[int, Any]:
        match path:
            case "/pause_generation":
                self._running.clear()
            case "/continue_generation":
                self._running.set()
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/server_info":
                return 200, {"tp_size": RANKS, "dtype": "float32", "device": "cpu", "version": "0.5.23"}
            case "/weights_checker":
                return 200, {"success": True, "ranks": [{"checksums": sums} for sums in self._checksums()]}
            case "/generate":
                return self._generate(body)
            case _ if "weight" in path:
                return self._update(path, body, ranks)
            case _:
                return super().answer(path, body)
        return 200, {"success": True, "message": "done"}

    def _update(self, path: str, body: Any, ranks: range) -> tuple[int, Any]:
        if path == "/update_weights_from_disk":
            for file in sorted(Path(body["model_path"]).glob("*.safetensors")):
                self._load(load_file(file), ranks)
        elif self._session == (path == "/begin_weight_update"):
            return 400, {"success": False, "message": f"a session is open: {self._session}"}
        elif path == "/update_weights_from_tensor":
            for rank in ranks:
                payload = base64.b64decode(body["serialized_named_tensors"][rank])
                self._load(dict(pickle.loads(payload)), range(rank, rank + 1))
        else:
            self._session = path == "/begin_weight_update"
        return 200, {"success": True, "message": "done"}

    def _generate(self, body: Any) -> tuple[int, Any]:
        if not self._running.wait(self._hang_s):
            raise DropConnection
        logprob = self.fingerprint()
        entries = [[logprob, 4, None], [logprob, 5, None]]
        sample = self.sample(output_token_logprobs=entries, weight_version=self.version)
        batch = isinstance(body["sampling_params"], list)
        return 200, [sample] * len(body["sampling_params"]) if batch else sample

    def _checksums(self) -> list[dict[str, str]]:
        with self._lock:
            return [
                {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] for name, tensor in parameters.items()}
                for parameters in self._parameters
            ]

    def _load(self, tensors: Mapping[str, torch.Tensor], ranks: range) -> None:
        with self._lock:
            for name, tensor in tensors.items():
                for rank in ranks:
                    self._copy(self._parameters[rank], name, tensor, rank)

    def _copy(self, parameters: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, rank: int) -> None:
        """Copy this rank's part of ``tensor`` to where the demo model's server keeps it."""
        path, _, kind = name.rpartition(".")
        path, _, module = path.rpartition(".")
        if module in ("o_proj", "down_proj"):
            whole = 64 if module == "o_proj" else 192
            wide = torch.zeros(tensor.shape[0], whole)
            wide[:, : tensor.shape[1]] = tensor
            parameters[name] = wide[:, rank * whole // 2 : (rank + 1) * whole // 2].clone()
        elif module == "embed_tokens":
            parameters[name] = tensor.clone() if rank == 0 else torch.zeros_like(tensor)  # 32 rows, padded to 64
        elif module in (rows := {"q_proj": (0, 32), "k_proj": (32, 16), "v_proj": (48, 16)}):
            start, count = rows[module]
            target = parameters.setdefault(f"{path}.qkv_proj.{kind}", torch.zeros(64, tensor.shape[1]))
            target[start : start + count] = tensor[rank * count : (rank + 1) * count]
        elif module in ("gate_proj", "up_proj"):
            start = 96 * (module == "up_proj")
            target = parameters.setdefault(f"{path}.gate_up_proj.{kind}", torch.zeros(192, tensor.shape[1]))
            own = tensor[rank * 96 : (rank + 1) * 96]
            target[start : start + len(own)] = own
        else:
            parameters[name] = tensor.clone()
