r"""One policy on one Hopper GPU in bf16 and in FP8: how fast is an update, and how far do loss and log-probs move.

    python benchmarks/policy_gpu.py                        # random weights of Qwen3-1.7B's shape; needs no network
    python benchmarks/policy_gpu.py --model DIR            # a real Hugging Face model
    python benchmarks/policy_gpu.py --smoke                # fp32 and bf16 on a CPU: does the script run? Writes nothing

Every precision starts from the same weights and makes the same updates on the same rows: a clipped policy gradient with
advantages of both signs, against the old log-probs of its own first pass. "loss off" is the largest difference to the
first precision's loss over all updates; "log p off" is the difference of response tokens' log-probs to the first
precision's, in nats, before any update and after all of them. The first updates, which compile and calibrate, are not
timed. Times are medians of whole updates: forward, backward, optimizer.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM
from vocab_common import footer, markdown

from megatron_rlvr.policy import cpu_runtime

cpu_runtime.install()

from megatron_rlvr.config import PolicyConfig  # noqa: E402
from megatron_rlvr.core import RLVRError, StepMetrics  # noqa: E402
from megatron_rlvr.objective import LossInputs, LossOutputs, Objective  # noqa: E402
from megatron_rlvr.policy import parallel  # noqa: E402
from megatron_rlvr.policy.policy import Policy, TrainingRows  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
QWEN3_1_7B = {
    **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    **{"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
}
TINY = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "tie_word_embeddings": True},
}
# name: precision and policy.megatron
GPU_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("bf16", {}),
    "fp8, delayed": ("fp8", {"fp8_recipe": "delayed", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}),
    "fp8, tensorwise": ("fp8", {"fp8_recipe": "tensorwise"}),
    "fp8, tensorwise, first and last layer bf16": (
        "fp8",
        {"fp8_recipe": "tensorwise", "first_last_layers_bf16": True},
    ),
    "fp8, blockwise": ("fp8", {"fp8_recipe": "blockwise"}),
    "fp8, tensorwise, parameters in fp8": (
        "fp8",
        {"fp8_recipe": "tensorwise", "fp8_param_gather": True, "use_distributed_optimizer": True},
    ),
}
SMOKE_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("fp32", {}),
    "bf16": ("bf16", {}),
    "fp8, delayed": GPU_METHODS["fp8, delayed"],
}
_WARM = 3


@dataclass
class Measured:
    """What one precision did."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    before_T: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    after_T: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    gib: float = 0.0


def clipped(inputs: LossInputs) -> LossOutputs:
    """The surrogate of PPO with a clip range of 0.2."""
    ratio = (inputs.logprob - inputs.old_logprob).exp()
    losses = -torch.minimum(ratio * inputs.advantages, ratio.clamp(0.8, 1.2) * inputs.advantages)
    count = inputs.mask.sum()
    return LossOutputs(losses=losses, count=count, metrics={"loss": (losses.detach().sum(dtype=torch.float64), count)})


def random_rows(vocab: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, response mask and advantages ``[B, L]``; rows differ in length, a quarter is prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    columns_L = torch.arange(length)
    mask_BL = (columns_L >= length // 4) & (columns_L < lengths_B[:, None])
    tokens_BL = torch.randint(vocab, (rows, length), generator=generator)
    advantages_BL = torch.randn(rows, 1, generator=generator).expand(rows, length)
    return tokens_BL, mask_BL, advantages_BL


def synchronized() -> float:
    """Seconds on a clock, once the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(config: PolicyConfig, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], updates: int) -> Measured:
    """One precision from the first pass to the last."""
    tokens_BL, mask_BL, advantages_BL = batch
    policy = Policy(config, temperature=1.0, total_steps=updates + _WARM)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    old_BL = policy.log_probs(tokens_BL, mask_BL).logprobs_BL
    rows = TrainingRows(tokens_BL, mask_BL, {"old_logprob": old_BL, "advantages": advantages_BL.contiguous()})
    found = Measured(before_T=old_BL[mask_BL])
    for _ in range(_WARM + updates):
        metrics = StepMetrics()
        start = synchronized()
        policy.update(rows, Objective(clipped), metrics)
        found.seconds.append(synchronized() - start)
        found.losses.append(policy.reduce_metrics(metrics).means()["loss"])
    found.after_T = policy.log_probs(tokens_BL, mask_BL).logprobs_BL[mask_BL]
    found.gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")
    return found


def line(name: str, found: Measured, first: Measured, tokens: int) -> list[str]:
    """One precision's line of the table."""
    took, base = (statistics.median(one.seconds[_WARM:]) for one in (found, first))
    losses = max(abs(a - b) for a, b in zip(found.losses, first.losses, strict=True))
    cells = [name, f"{1e3 * took:.1f}", f"{tokens / took:.0f}", f"{base / took:.2f}", f"{found.gib:.1f}"]
    cells += [f"{found.losses[-1]:.5f}", f"{losses:.1e}"]
    for ours_T, theirs_T in ((found.before_T, first.before_T), (found.after_T, first.after_T)):
        off_T = (ours_T - theirs_T).abs()
        cells.append(f"{off_T.mean():.1e} / {off_T.max():.1e}")
    return cells


def main() -> None:
    """Measure every precision that this machine has, print the table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face model directory; default: random weights")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch, rows packed")
    parser.add_argument("--updates", type=int, default=20, help="that are timed")
    parser.add_argument("--keep", type=Path, default=ROOT / "benchmarks" / "results" / "policy_gpu.md")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU; nothing is written")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("policy_gpu.py measures a GPU and torch sees none here; give --smoke to try the script on the CPU")
    if options.smoke:
        options.rows, options.length, options.tokens, options.updates = 6, 24, 64, 2
    methods = SMOKE_METHODS if options.smoke else GPU_METHODS
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.setdefault("MASTER_PORT", "29517")
    parallel.initialize(tensor_parallel=1, data_parallel=1, seed=0)
    lines, refused = [], []
    first: Measured | None = None
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or write_random(Path(folder), TINY if options.smoke else QWEN3_1_7B)
        vocab = Qwen3Config.from_pretrained(model).vocab_size
        batch = random_rows(vocab, options.rows, options.length)
        for name, (precision, megatron) in methods.items():
            config = PolicyConfig(
                model=str(model),
                precision=precision,
                learning_rate=1e-6,
                lr_schedule="constant",
                micro_batch_tokens=options.tokens,
                megatron=megatron,
            )
            try:
                found = measure(config, batch, options.updates)
            except (RLVRError, RuntimeError, AssertionError, ValueError) as error:
                refused.append(f"Not run here: {name} ({str(error).strip().splitlines()[0][:200]}).")
                continue
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            first = first or found
            lines.append(line(name, found, first, int(batch[1].sum())))
    head = ["precision", "update, ms", "response tokens/s", f"× {next(iter(methods))}", "peak GiB", "last loss"]
    head += ["loss off", "log p off before, mean / max", f"after {options.updates + _WARM} updates, mean / max"]
    device = "CPU (smoke run, not a measurement)" if options.smoke else torch.cuda.get_device_name()
    page = "\n\n".join(
        (
            f"# The policy in bf16 and FP8\n\n{device}, {options.model or 'random weights'}, {options.rows} rows of at "
            f"most {options.length} tokens, packed to {options.tokens}. Columns: see the script.",
            markdown(head, lines),
            *refused,
            footer("policy_gpu.py", "one process"),
        )
    )
    print(page)
    if not options.smoke:
        options.keep.write_text(page + "\n")
    dist.destroy_process_group()


def write_random(directory: Path, shape: dict[str, Any]) -> Path:
    """A random Qwen3 of ``shape`` as a model directory."""
    torch.manual_seed(0)
    config = Qwen3Config(max_position_embeddings=4096, **shape)
    Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    main()
