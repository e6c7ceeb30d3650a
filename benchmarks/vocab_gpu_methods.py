"""The output heads that `vocab_gpu.py` times: the package's, materialised torch, and peers where they import.

Peers are imported one file at a time, as in `vocab_peers.py`, from the folder given with ``--peers``:

    pip install --target DIR --no-deps verl==0.9.1 liger-kernel==0.8.5
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vocab_peers

from megatron_rlvr.vocab import TokenStats, linear_policy_loss, linear_token_stats
from megatron_rlvr.vocab.rows import Backend


@dataclass(frozen=True)
class Problem:
    """One shape: leaves that want gradients, targets, and each token's upstream gradients g and h.

    Attributes:
        hidden: ``[T, H]``.
        weight: ``[V, H]``; has ``main_grad``.
        targets: ``[T]``.
        grad_logprob: g, ``[T]`` fp32.
        grad_entropy: h, ``[T]`` fp32.
        backend: For the package's functions.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    grad_logprob: torch.Tensor
    grad_entropy: torch.Tensor
    backend: Backend

    def loss(self, logprob_T: torch.Tensor, entropy_T: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
        """Each token's loss, whose derivatives are g and h."""
        return self.grad_logprob[part] * logprob_T + self.grad_entropy[part] * entropy_T

    def backward(self, loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the hidden states and of the weight."""
        return torch.autograd.grad(loss, (self.hidden, self.weight), allow_unused=True)


@dataclass(frozen=True)
class Method:
    """One head.

    Attributes:
        name: As the table shows it.
        units: GEMM passes of its yardstick: 3 for forward and backward, 1 for a forward pass alone.
        run: Does the work once; returns the gradients of hidden states and weight, or the statistics.
        same_loss: Whether its gradients are those of `Problem.loss`.
    """

    name: str
    units: int
    run: Callable[[Problem], Any]
    same_loss: bool = True


def problem_of(tokens: int, hidden: int, vocab: int, device: torch.device, seed: int) -> Problem:
    """Hidden states and a weight whose logits spread over a few nats, as those of a trained model do."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    weight = normal(vocab, hidden).mul_(3.0 * hidden**-0.5).requires_grad_()
    weight.main_grad = torch.zeros(vocab, hidden, device=device)  # type: ignore[attr-defined]
    return Problem(
        normal(tokens, hidden).requires_grad_(),
        weight,
        torch.randint(vocab, (tokens,), generator=generator, device=device),
        normal(tokens).float(),
        normal(tokens).float().mul_(0.01),
        "triton" if device.type == "cuda" else "torch",
    )


def ours() -> list[Method]:
    """The package's heads."""

    def sweep(main_grad: bool, chunk_rows: int | None = None) -> Callable[[Problem], Any]:
        def run(problem: Problem) -> Any:
            def token_loss(stats: TokenStats, part: slice) -> torch.Tensor:
                return problem.loss(stats.logprob, stats.entropy, part)

            output = linear_policy_loss(
                problem.hidden,
                problem.weight,
                problem.targets,
                token_loss,
                backend=problem.backend,
                main_grad=main_grad,
                chunk_rows=chunk_rows,
            )
            return problem.backward(output.loss)

        return run

    def both_passes(problem: Problem) -> Any:
        stats = linear_token_stats(problem.hidden, problem.weight, problem.targets, backend=problem.backend)
        return problem.backward(problem.loss(stats.logprob, stats.entropy).sum())

    @torch.no_grad()
    def forward(problem: Problem) -> Any:
        return linear_token_stats(problem.hidden, problem.weight, problem.targets, backend=problem.backend)

    return [
        Method("**linear_policy_loss**", 3, sweep(False)),
        Method("**linear_policy_loss**, main_grad", 3, sweep(True)),
        Method("**linear_policy_loss**, main_grad, chunks of 4096", 3, sweep(True, 4096)),
        Method("**linear_policy_loss**, main_grad, chunks of 8192", 3, sweep(True, 8192)),
        Method("**linear_token_stats**", 3, both_passes),
        Method("**linear_token_stats**, forward", 1, forward),
    ]


def materialised() -> Method:
    """What torch's own functions make of it, logits in fp32."""

    def run(problem: Problem) -> Any:
        logp_TV = (problem.hidden @ problem.weight.t()).float().log_softmax(dim=-1)
        logprob_T = logp_TV.gather(1, problem.targets[:, None]).squeeze(1)
        return problem.backward(problem.loss(logprob_T, -(logp_TV.exp() * logp_TV).sum(dim=-1)).sum())

    return Method("torch, materialised", 3, run)


def verl(directory: Path) -> list[Method]:
    """The Triton head of verl."""
    vocab_peers.stub_module(
        "verl.utils.device",
        is_cuda_available=True,
        get_device_capability=torch.cuda.get_device_capability,
        get_device_name=lambda: "cuda",
        get_torch_device=lambda: torch.cuda,
    )
    head = vocab_peers.import_module_file(directory, "verl.utils.kernel.linear_cross_entropy").LinearCrossEntropy

    def both(problem: Problem) -> Any:
        return problem.backward(problem.loss(*head.apply(problem.hidden, problem.weight, problem.targets)).sum())

    @torch.no_grad()
    def forward(problem: Problem) -> Any:
        return head.apply(problem.hidden, problem.weight, problem.targets)

    return [Method("verl, Triton head", 3, both), Method("verl, Triton head, forward", 1, forward)]


def liger(directory: Path) -> list[Method]:
    """Liger's cross entropy (no entropy, one weight for all tokens), its torch head, and its Hopper kernel."""
    linear = vocab_peers.import_module_file(directory, "liger_kernel.ops.fused_linear_cross_entropy")
    scaled = vocab_peers.import_module_file(directory, "liger_kernel.ops.fused_linear_scaled_cross_entropy")

    def cross_entropy(problem: Problem) -> Any:
        loss = linear.LigerFusedLinearCrossEntropyFunction.apply(problem.hidden, problem.weight, problem.targets)
        return problem.backward(loss[0] if isinstance(loss, tuple) else loss)

    def fallback(problem: Problem) -> Any:
        function = scaled._FusedLinearPPOFallbackFunction
        nll_T, entropy_T, *_ = function.apply(problem.hidden, problem.weight, problem.targets, 1.0, -100, True)
        return problem.backward(problem.loss(-nll_T, entropy_T).sum())

    def hopper(problem: Problem) -> Any:
        function = scaled.LigerFusedLinearScaledCrossEntropyFunction
        nll_T, entropy_T = function.apply(problem.hidden, problem.weight, problem.targets, return_entropy=True)
        return problem.backward(problem.loss(-nll_T, entropy_T).sum())

    return [
        Method("Liger fused linear CE, no entropy", 3, cross_entropy, same_loss=False),
        Method("Liger torch head", 3, fallback),
        Method("Liger CuTe head", 3, hopper),
    ]


def all_methods(directory: Path | None) -> tuple[list[Method], dict[str, str]]:
    """Every head that could be set up, and why the others could not."""
    methods, missing = [*ours(), materialised()], {}
    for package, loader in (("verl", verl), ("liger_kernel", liger)):
        if directory is None or not (directory / package).is_dir():
            missing[package] = "not in --peers"
            continue
        try:
            methods += loader(directory)
        except (ImportError, AttributeError) as error:
            missing[package] = f"does not import here: {error}"
    return methods, missing
