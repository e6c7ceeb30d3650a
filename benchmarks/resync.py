"""Seconds and bytes of a weight resync by transport, beside saving and loading from disk without any proof.

Usage: ``python benchmarks/resync.py [--megabytes 200] [--repeats 5] [--bucket-megabytes 32] [--keep FILE]``. Launches a
real SGLang server (TP=1, CPU) on a random Qwen3 of about that size; takes some minutes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from megatron_rlvr.rollout.resync import BroadcastTransport, DiskTransport, Resync, TensorTransport, Transport
from megatron_rlvr.rollout.sglang.client import SGLangClient
from megatron_rlvr.rollout.sglang.flags import find_python, read_installation
from megatron_rlvr.rollout.sglang.fleet import FleetEngine, SGLangFleet
from megatron_rlvr.rollout.sglang.server import START_TIMEOUT_S, sglang_server

BASE = Path(__file__).parents[1] / "examples" / "countdown" / "base"
HIDDEN = 512
GB = 1e9


class Counted(SGLangClient):
    """A client that adds up what its requests carry, bytes."""

    sent = 0

    def _send(self, method: str, endpoint: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        for payload in (body or {}).get("serialized_named_tensors", ()):
            self.sent += len(payload)
        return super()._send(method, endpoint, body, timeout_s)


def write_model(directory: Path, megabytes: float) -> dict[str, torch.Tensor]:
    """A random float32 Qwen3 of about that size, with the demo's tokenizer; its weights."""
    per_layer = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN) / 1e6
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=max(1, round(megabytes / per_layer)),
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=HIDDEN // 8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(directory)
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


class Stall:
    """Streams one endless request after another and notes the longest time without a token, seconds."""

    def __init__(self, client: SGLangClient) -> None:
        self.longest = 0.0
        self._client = client

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Generate for the length of the block."""
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self._stream, stop)
            time.sleep(1.0)
            self.longest = 0.0
            yield
            time.sleep(0.5)
            stop.set()
            self._client.abort_all()
            done.result()

    def _stream(self, stop: threading.Event) -> None:
        last = time.perf_counter()
        body = {
            "input_ids": [5, 6, 7],
            "sampling_params": {"max_new_tokens": 480, "ignore_eos": True},
            "stream": True,
        }
        while not stop.is_set():
            with self._client._http.stream("POST", "/generate", json=body, timeout=120.0) as lines:
                for line in lines.iter_lines():
                    if line.startswith("data: {"):
                        now = time.perf_counter()
                        self.longest, last = max(self.longest, now - last), now
                    if stop.is_set():
                        break


def seconds(action: Callable[[], object], repeats: int) -> float:
    """The median of ``repeats`` runs after a first that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def measure(directory: Path, weights: dict[str, torch.Tensor], url: str, repeats: int, bucket: int) -> list[str]:
    """The table's rows."""
    size = sum(tensor.nbytes for tensor in weights.values()) / GB
    client = Counted(url, timeout_s=120.0)
    plain = directory / "plain"
    plain.mkdir()

    def save_and_load() -> None:
        save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
        client.update_weights_from_disk(str(plain))

    unproved = seconds(save_and_load, repeats)
    rows = [f"| plain save and load, nothing proved | {unproved:.2f} | {unproved / size:.2f} | 1.00 | |"]
    ways: dict[str, Transport] = {
        "disk": DiskTransport(directory / "transport"),
        "tensor (by value)": TensorTransport(),
        "broadcast (gloo)": BroadcastTransport(timeout_s=120.0),
    }
    version = 0
    for name, way in ways.items():
        sync = Resync(directory, way, bucket_bytes=bucket, pause="retract")
        fleet = SGLangFleet(directory, AutoTokenizer.from_pretrained(directory), [FleetEngine(client)], sync)

        def resync(fleet: SGLangFleet = fleet) -> None:
            nonlocal version
            version += 1
            fleet.resync(weights.items(), version)

        before = client.sent
        taken = seconds(resync, repeats)
        wire = (client.sent - before) / (repeats + 1) / GB / size or 1.0
        stall = Stall(client)
        with stall.measured():
            resync()
        sync.close()
        rows.append(f"| {name} | {taken:.2f} | {taken / size:.2f} | {wire:.2f} | {stall.longest:.2f} |")
    return [f"{size:.3f} GB of float32 weights, buckets of {bucket / 1e6:.0f} MB, median of {repeats}:", "", *rows]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-megabytes", type=float, default=32.0)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="rlvr-resync-") as scratch:
        directory = Path(scratch)
        weights = write_model(directory, options.megabytes)
        server = sglang_server(read_installation(find_python()), directory, {}, directory / "server.log")
        try:
            server.start()
            server.wait_ready(SGLangClient(server.url), time.monotonic() + START_TIMEOUT_S)
            found = measure(directory, weights, server.url, options.repeats, int(options.bucket_megabytes * 1e6))
        finally:
            server.close()
    intro, blank, *rows = found
    head = ["| way | s | s per GB | bytes on the wire per byte of weights | longest pause of a running stream, s |"]
    text = "\n".join([intro, blank, *head, "|---|---|---|---|---|", *rows])
    print(text)
    if options.keep:
        options.keep.write_text(text + "\n")


if __name__ == "__main__":
    main()
