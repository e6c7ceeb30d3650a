"""Tokens per second of an optimizer update in every layout, beside transformers and torch's AdamW on the same model.

    python benchmarks/policy_scaling.py --keep benchmarks/results/policy_scaling.md  # 4 minutes, on idle cores only

The model is a random Qwen3 (6 layers of width 128, vocabulary 4,096), the mini-batch 32 rows of 40 to 200 tokens.
Everyone computes the clipped surrogate of the same response tokens in fp32 and steps AdamW. Runs take turns, and the
fastest update of each counts: what else the machine does can only slow one down.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM
from vocab_common import footer, launch, markdown

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "one rank, packed by tokens": {"micro_batch_tokens": 1024},
    "TP 2": {"tensor_parallel": 2},
    "TP 2 + sequence parallel": {"tensor_parallel": 2, "sequence_parallel": True},
    "PP 2": {"pipeline_parallel": 2},
    "PP 2, VPP 3 (interleaved)": {"pipeline_parallel": 2, "virtual_pipeline": 3},
    "CP 2": {"context_parallel": 2},
    "DP 2": {"data_parallel": 2},
    "DP 2, packed by tokens": {"data_parallel": 2, "micro_batch_tokens": 1024},
    "DP 2 + distributed optimizer": {"data_parallel": 2, "megatron": {"use_distributed_optimizer": True}},
}
PEERS = {"transformers + AdamW, one thread": 1, "transformers + AdamW, two threads": 2}
_RANKS = ("tensor_parallel", "pipeline_parallel", "context_parallel", "data_parallel")
VOCAB, ROWS, MICRO_BATCH, UPDATES = 4096, 32, 8, 3
CLIP = 0.2

Batch = dict[str, torch.Tensor]


def main() -> None:
    """Measure, print, and keep the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="write the page to this file, too")
    parser.add_argument("--rounds", type=int, default=2, help="how often everyone takes a turn")
    options = parser.parse_args()
    batch = random_rows()
    fastest = dict.fromkeys([*PEERS, *LAYOUTS], math.inf)
    with tempfile.TemporaryDirectory() as folder:
        model, output = Path(folder) / "model", Path(folder) / "seconds"
        write_model(model)
        for _ in range(options.rounds):
            for name in fastest:
                if name in PEERS:
                    launch(run_peer, 1, PEERS[name], model, batch, output)
                else:
                    ranks = math.prod(LAYOUTS[name].get(key, 1) for key in _RANKS)
                    launch(run_rank, ranks, LAYOUTS[name], ranks, model, batch, output)
                fastest[name] = min(fastest[name], float(output.read_text()))
                print(name, f"{fastest[name]:.2f} s", flush=True)
    tokens = int(batch["lengths_B"].sum())
    alone, peer = fastest["one rank"], fastest[next(iter(PEERS))]
    lines = [
        [name, f"{tokens / seconds:,.0f}", f"{alone / seconds:.2f}", f"{peer / seconds:.2f}"]
        for name, seconds in fastest.items()
    ]
    page = "\n\n".join(
        (
            "# Throughput of an update, by layout",
            f"{ROWS} rows, {tokens:,} tokens, prompts included, fp32 on {os.cpu_count()} CPU cores, one thread per "
            "rank; the fastest of several updates.",
            markdown(["", "tokens/s", "to one rank", "to transformers on one thread"], lines),
            footer("policy_scaling.py", f"{options.rounds} turns of {UPDATES} updates"),
        )
    )
    print(page)
    if options.keep:
        options.keep.write_text(page + "\n")


def write_model(directory: Path) -> None:
    """A small random Qwen3."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)


def random_rows() -> Batch:
    """Prompts of 20 to 40 tokens and responses of 20 to 160, with advantages of both signs."""
    generator = torch.Generator().manual_seed(0)
    prompts_B = torch.randint(20, 41, (ROWS,), generator=generator)
    lengths_B = prompts_B + torch.randint(20, 161, (ROWS,), generator=generator)
    columns_L = torch.arange(int(lengths_B.max()))
    used_BL = columns_L < lengths_B[:, None]
    return {
        "lengths_B": lengths_B,
        "tokens_BL": torch.randint(1, VOCAB, used_BL.shape, generator=generator) * used_BL,
        "mask_BL": used_BL & (columns_L >= prompts_B[:, None]),
        "old_logprob": torch.full(used_BL.shape, -math.log(VOCAB)),
        "advantages": torch.randn(ROWS, generator=generator)[:, None].repeat(1, len(columns_L)),
    }


def surrogate(logprob: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The clipped loss of each token."""
    ratio = (logprob - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)


def run_rank(
    rank: int, meeting: str, layout: dict[str, Any], ranks: int, model: Path, batch: Batch, output: Path
) -> None:
    """One rank of the policy."""
    warnings.filterwarnings("ignore", module="megatron")
    os.environ |= {"WORLD_SIZE": str(ranks)}
    from megatron_rlvr.policy import cpu_runtime

    cpu_runtime.install()
    from megatron_rlvr.config import PolicyConfig
    from megatron_rlvr.core import StepMetrics
    from megatron_rlvr.objective import LossInputs, LossOutputs, Objective
    from megatron_rlvr.policy import parallel
    from megatron_rlvr.policy.policy import Policy, TrainingRows

    def loss(inputs: LossInputs) -> LossOutputs:
        losses = surrogate(inputs.logprob, inputs.old_logprob, inputs.advantages)
        return LossOutputs(losses=losses, count=inputs.mask.sum(), metrics={})

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    config = PolicyConfig(model=str(model), micro_batch=MICRO_BATCH, **layout)
    parallel.initialize(
        tensor_parallel=config.tensor_parallel,
        data_parallel=config.data_parallel,
        pipeline_parallel=config.pipeline_parallel,
        virtual_pipeline=config.virtual_pipeline,
        context_parallel=config.context_parallel,
        seed=0,
    )
    policy = Policy(config, temperature=1.0, total_steps=1)
    rows = TrainingRows(batch["tokens_BL"], batch["mask_BL"], {k: batch[k] for k in ("old_logprob", "advantages")})
    seconds = fastest_of(lambda: policy.update(rows, Objective(loss), StepMetrics()))
    if rank == 0:
        output.write_text(str(seconds))
    parallel.shutdown()


def run_peer(_rank: int, _meeting: str, threads: int, model: Path, batch: Batch, output: Path) -> None:
    """Transformers with the attention and the head that it brings, in micro-batches of as many rows."""
    torch.set_num_threads(threads)
    network = Qwen3ForCausalLM.from_pretrained(model, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)

    def update() -> None:
        optimizer.zero_grad()
        for rows in torch.split(torch.arange(ROWS), MICRO_BATCH):
            length = int(batch["lengths_B"][rows].max())
            part = {name: batch[name][rows, :length] for name in batch if name != "lengths_B"}
            logits_BLV = network(part["tokens_BL"], use_cache=False).logits[:, :-1]
            chosen = part["mask_BL"][:, 1:]
            logprob_T = logits_BLV[chosen].log_softmax(-1).gather(1, part["tokens_BL"][:, 1:][chosen][:, None])[:, 0]
            old_T, advantages_T = (part[name][:, 1:][chosen] for name in ("old_logprob", "advantages"))
            losses_T = surrogate(logprob_T, old_T, advantages_T)
            torch.autograd.backward(losses_T.sum() / batch["mask_BL"].sum())
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    output.write_text(str(fastest_of(update)))


def fastest_of(update: Callable[[], object]) -> float:
    """Seconds of the fastest update after a first one that allocates."""
    update()
    seconds = []
    for _ in range(UPDATES):
        start = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
