"""Shared by the tests of the loss: random tokens of whole sequences, settings of every surrogate, gradients."""

from __future__ import annotations

import dataclasses

import torch

from megatron_rlvr.objective import LossInputs, LossOutputs, LossSettings, policy_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
SURROGATES = {
    "ppo": LossSettings(**CLIP),
    "dual": LossSettings(**CLIP, dual_clip=1.4),
    "gspo": LossSettings("gspo", clip_low=0.05, clip_high=0.05, dual_clip=1.3),
    "cispo": LossSettings("cispo", **CLIP),
    "gppo": LossSettings("gppo", **CLIP, gppo_low=0.5, gppo_high=0.75),
    "none": LossSettings("none"),
}
FIELDS = [field.name for field in dataclasses.fields(LossInputs)]


def tokens(seed: int, size: int = 24, masked: float = 0.2, **fields: torch.Tensor) -> LossInputs:
    """Packed sequences of about 5 tokens, ratios on both sides of every clip, one advantage for each sequence."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    sequence = torch.arange(size) // 5
    old = -noise().abs() - 1.0
    per_sequence = noise() * (torch.arange(size) % 4 > 0)
    values = {
        "logprob": old + 0.4 * noise(),
        "old_logprob": old,
        "advantages": per_sequence[sequence],
        "entropy": noise().abs(),
        "mask": torch.rand(size, generator=generator) >= masked,
        "sequence": sequence,
        **fields,
    }
    values["logprob"] = values["logprob"].detach().clone().requires_grad_()
    return LossInputs(**values)


def everything(seed: int, size: int = 24) -> LossInputs:
    """As `tokens`, with every optional field."""
    base = tokens(seed, size)
    generator = torch.Generator().manual_seed(seed + 1)

    def noise() -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return replaced(
        base,
        weight=noise().abs(),
        scale=noise().abs() + 0.1,
        penalty=noise().clamp(min=0.0),
        bonus=noise().clamp(min=0.0),
        reference_logprob=base.old_logprob + 0.3 * noise(),
        nucleus_entropy=noise().abs().requires_grad_(),
        entropy_slope=noise(),
        entropy_grad_norm=noise().abs(),
    )


def replaced(inputs: LossInputs, **fields: torch.Tensor | None) -> LossInputs:
    """A copy with some fields replaced and leaves of its own."""
    values = {name: fields.get(name, getattr(inputs, name)) for name in FIELDS}
    values["logprob"] = values["logprob"].detach().clone().requires_grad_()
    return LossInputs(**values)


def part(inputs: LossInputs, index: slice) -> LossInputs:
    """Some of the tokens, on the same leaves."""
    return LossInputs(**{n: None if (v := getattr(inputs, n)) is None else v[index] for n in FIELDS})


def gradient(outputs: LossOutputs, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(outputs.loss_sum, leaf, retain_graph=True)[0]


def loss_and_gradient(inputs: LossInputs, settings: LossSettings) -> tuple[LossOutputs, torch.Tensor]:
    outputs = policy_loss(inputs, settings)
    return outputs, gradient(outputs, inputs.logprob)
