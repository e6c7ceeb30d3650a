"""What attribution's extras and the nucleus entropy add to the vocabulary head, in CPU time of one thread.

    python benchmarks/vocab_extras.py            # half a minute

fp32, no tensor parallelism; the fastest of several turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_rlvr.vocab import TokenStats, linear_policy_loss, linear_token_stats

TOKENS, COLUMNS, HIDDEN, TURNS = 1024, 32000, 512, 5
ADDED: dict[str, dict[str, Any]] = {
    "log p and H": {},
    "with extras (attribution)": {"extras": True},
    "with a nucleus of 0.8": {"nucleus": 0.8},
}


def token_loss(stats: TokenStats, rows: slice) -> torch.Tensor:
    """A policy term and an entropy bonus."""
    return -stats.logprob - 0.01 * stats.entropy


def main() -> None:
    """Print CPU seconds of both functions with everything added, and the ratios."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden_TH = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    weight_VH = (3 / HIDDEN**0.5 * torch.randn(COLUMNS, HIDDEN)).requires_grad_()
    targets_T = torch.randint(COLUMNS, (TOKENS,))

    def update(**added: Any) -> None:
        linear_policy_loss(hidden_TH, weight_VH, targets_T, token_loss, **added).loss.backward()
        hidden_TH.grad = weight_VH.grad = None

    @torch.no_grad()
    def log_probs(**added: Any) -> None:
        linear_token_stats(hidden_TH, weight_VH, targets_T, **added)

    ways: dict[str, Callable[..., None]] = {"update (`linear_policy_loss`)": update, "log-prob pass": log_probs}
    print("| | " + " | ".join(ADDED) + " |")
    print("|---" * (len(ADDED) + 1) + "|")
    for name, way in ways.items():
        seconds = dict.fromkeys(ADDED, float("inf"))
        for _ in range(TURNS):
            for what, added in ADDED.items():
                started = time.process_time()
                way(**added)
                seconds[what] = min(seconds[what], time.process_time() - started)
        first = seconds["log p and H"]
        print(f"| {name} | " + " | ".join(f"{value:.2f} s, {value / first:.2f}×" for value in seconds.values()) + " |")


if __name__ == "__main__":
    main()
