"""Seconds and bytes of a weight resync by transport, beside saving and loading from disk without any proof.

Usage: ``python benchmarks/resync.py [--megabytes 200] [--repeats 5] [--bucket-megabytes 32] [--keep FILE]``. Launches a
real SGLang server (TP=1) on a random Qwen3 of about that size; takes some minutes. In float32 on the CPU; where there
are GPUs in bfloat16, the server on the first and the weights on the last, and by NCCL if these are two:

    SGLANG_PYTHON=… python benchmarks/resync.py --megabytes 4000 --bucket-megabytes 256 \
        --keep benchmarks/results/resync_gpu.md

with SGLang's own CUDA environment (see patches/README.md).
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
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from megatron_rlvr.rollout.resync import BroadcastTransport, DiskTransport, Resync, TensorTransport, Transport
from megatron_rlvr.rollout.sglang.client import SGLangClient
from megatron_rlvr.rollout.sglang.engines import FleetEngine
from megatron_rlvr.rollout.sglang.flags import Flag, find_python, read_installation
from megatron_rlvr.rollout.sglang.fleet import SGLangFleet
from megatron_rlvr.rollout.sglang.server import START_TIMEOUT_S, sglang_server

BASE = Path(__file__).parents[1] / "examples" / "countdown" / "base"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.device_count() - 1) if CUDA else torch.device("cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
BACKEND: Literal["gloo", "nccl"] = "nccl" if torch.cuda.device_count() > 1 else "gloo"
FLAGS: dict[str, Flag] = {}
if CUDA:
    FLAGS = {"attention_backend": "triton", "sampling_backend": "pytorch", "mem_fraction_static": 0.5}
START_S = 600.0 if CUDA else START_TIMEOUT_S  # kernels are compiled
HIDDEN = 2048 if CUDA else 512
HEAD = 64
GB = 1e9


class Counted(SGLangClient):
    """A client that adds up what its requests carry, bytes."""

    sent = 0

    def _post(self, endpoint: str, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        for payload in body.get("serialized_named_tensors", ()):
            self.sent += len(payload)
        return super()._post(endpoint, body, timeout_s)


def write_model(directory: Path, megabytes: float) -> dict[str, torch.Tensor]:
    """A random Qwen3 of about that size, with the demo's tokenizer; its weights, on `DEVICE`."""
    per_layer = DTYPE.itemsize * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN) / 1e6
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=max(1, round(megabytes / per_layer)),
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=HIDDEN // HEAD,
        head_dim=HEAD,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(DEVICE, DTYPE)
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
        f"tensor ({'CUDA IPC' if CUDA else 'by value'})": TensorTransport(),
        f"broadcast ({BACKEND})": BroadcastTransport(timeout_s=120.0, backend=BACKEND),
    }
    # Before sessions a server did not flush while retracted requests wait; the stream then starts anew.
    pause: Literal["retract", "abort"] = "retract" if client.sessions else "abort"
    version = 0
    for name, way in ways.items():
        sync = Resync(directory, way, bucket_bytes=bucket, pause=pause)
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
    where = f"{torch.cuda.get_device_name()} × {torch.cuda.device_count()}" if CUDA else "CPU"
    intro = f"{where}, SGLang {client.server_info()['version']}: {size:.3f} GB of {str(DTYPE).removeprefix('torch.')} "
    return [intro + f"weights, buckets of {bucket / 1e6:.0f} MB, median of {repeats}:", "", *rows]


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
        server = sglang_server(read_installation(find_python()), directory, FLAGS, directory / "server.log")
        try:
            server.start()
            server.wait_ready(SGLangClient(server.url), time.monotonic() + START_S)
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
