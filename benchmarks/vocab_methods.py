"""The package's functions, torch's and Megatron-Core's behind one signature, as the vocabulary benchmarks call them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from megatron_rlvr.vocab import TokenStats, linear_policy_loss, linear_token_stats, token_stats

Tensors = Sequence[torch.Tensor]
Outputs = tuple[torch.Tensor, "torch.Tensor | None"]
# (inputs, targets, group) -> log-prob [T] and entropy [T]; an entropy without a gradient, or none, where it has none.
Function = Callable[[Tensors, torch.Tensor, dist.ProcessGroup], Outputs]
PHASE = ["forward"]  # what runs just now, for whoever counts collectives


@dataclass(frozen=True)
class Outcome:
    """What a method returned: log-prob, entropy (if any), the inputs' gradients, and whether H is differentiable."""

    logprob: torch.Tensor
    entropy: torch.Tensor | None
    grads: tuple[torch.Tensor, ...]
    entropy_grad: bool


@dataclass(frozen=True)
class Method:
    """One implementation.

    Attributes:
        name: As the tables show it.
        hidden: Whether its inputs are (hidden, weight) rather than (logits,).
        sharded: Whether it runs on a vocabulary shard of a group.
        function: Forward pass; gradients come from autograd. ``None`` for the one-sweep form.
        compiled: Whether it calls ``torch.compile`` and needs a run before it is timed.
        widened: Whether it is meant for fp32 logits, which Megatron-Core's ``Float16Module`` makes of bf16 ones first.
    """

    name: str
    hidden: bool
    sharded: bool
    function: Function | None
    compiled: bool = False
    widened: bool = False

    def run(
        self, inputs: Tensors, targets: torch.Tensor, upstream: tuple[torch.Tensor, torch.Tensor], group: Any
    ) -> Outcome:
        """Forward and backward with the given gradients of log-prob and entropy. Inputs may be overwritten."""
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        PHASE[0] = "forward"
        if self.function is None:
            return _sweep(leaves, targets, upstream, group)
        logprob, entropy = self.function(leaves, targets, group)
        differentiable = entropy is not None and entropy.requires_grad
        PHASE[0] = "backward"
        outputs = [logprob] if entropy is None or not differentiable else [logprob, entropy]
        grads = torch.autograd.grad(
            outputs, leaves, [grad.to(out.dtype) for grad, out in zip(upstream, outputs, strict=False)]
        )
        return Outcome(logprob.detach(), None if entropy is None else entropy.detach(), grads, differentiable)


def _sweep(leaves: Tensors, targets: torch.Tensor, upstream: tuple[torch.Tensor, torch.Tensor], group: Any) -> Outcome:
    def loss(stats: TokenStats, rows: slice) -> torch.Tensor:
        return upstream[0][rows] * stats.logprob + upstream[1][rows] * stats.entropy

    output = linear_policy_loss(leaves[0], leaves[1], targets, loss, group=group)
    PHASE[0] = "backward"
    grads = torch.autograd.grad(output.loss, list(leaves))
    return Outcome(output.logprob, output.entropy, grads, True)


def _linear(inputs: Tensors) -> torch.Tensor:
    return functional.linear(inputs[0], inputs[1])


def _materialised(logits: torch.Tensor, targets: torch.Tensor) -> Outputs:
    logp_TV = torch.log_softmax(logits.float(), dim=-1)
    return logp_TV.gather(1, targets[:, None]).squeeze(1), -(logp_TV.exp() * logp_TV).sum(-1)


def ours() -> list[Method]:
    """The package's three forms, and torch without any of them."""

    def from_logits(inputs: Tensors, targets: torch.Tensor, group: Any, reuse: bool = False) -> Outputs:
        stats = token_stats(inputs[0], targets, group=group, reuse_logits=reuse)
        return stats.logprob, stats.entropy

    def from_hidden(inputs: Tensors, targets: torch.Tensor, group: Any) -> Outputs:
        stats = linear_token_stats(inputs[0], inputs[1], targets, group=group)
        return stats.logprob, stats.entropy

    def reusing(inputs: Tensors, targets: torch.Tensor, group: Any) -> Outputs:
        return from_logits(inputs, targets, group, reuse=True)

    return [
        Method("**token_stats**", False, True, from_logits),
        Method("**token_stats, reuse_logits**", False, True, reusing),
        Method("**linear_policy_loss** (one sweep)", True, True, None),
        Method("**linear_token_stats** (two passes)", True, True, from_hidden),
    ]


def torch_alone() -> list[Method]:
    """The functions of torch itself, unsharded."""

    def chunked(inputs: Tensors, targets: torch.Tensor, _: Any) -> Outputs:
        options = torch.nn.LinearCrossEntropyOptions()
        return -functional.linear_cross_entropy(inputs[0], inputs[1], targets, reduction="none", options=options), None

    return [
        Method("torch, materialised", False, False, lambda x, targets, _: _materialised(x[0], targets)),
        Method("torch, materialised", True, False, lambda x, targets, _: _materialised(_linear(x), targets)),
        Method("torch F.linear_cross_entropy", True, False, chunked),
    ]


def megatron() -> list[Method]:
    """Megatron-Core's two cross entropies; they overwrite fp32 logits."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def unfused(inputs: Tensors, targets: torch.Tensor, _: Any) -> Outputs:
        return -vocab_parallel_cross_entropy(inputs[0], targets), None

    def fused(inputs: Tensors, targets: torch.Tensor, group: Any) -> Outputs:
        return -fused_vocab_parallel_cross_entropy(inputs[0], targets, group), None

    return [
        Method("Megatron-Core CE", False, True, unfused),
        Method("Megatron-Core fused CE", False, True, fused, compiled=True),
    ]
