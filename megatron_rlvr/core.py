"""The nouns of the system, shared by every room: prompts, samples, verdicts, batches, step metrics.

Axes used in tensor names throughout the project: ``B`` samples (rows), ``L`` positions of a padded row, ``T`` tokens,
``V`` vocabulary, ``G`` samples of one prompt (a group).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch


class RLVRError(Exception):
    """A failure that the user can mend; its text is one sentence naming what, which value and how to mend it."""


class Verdict(enum.StrEnum):
    """What the verifier says of one sample. Only ``ACCEPTED`` earns a reward; ``INFRA_ERROR`` is no verdict at all."""

    ACCEPTED = "accepted"
    WRONG_ANSWER = "wrong_answer"
    NO_ANSWER = "no_answer"
    TIME_LIMIT = "time_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    RUNTIME_ERROR = "runtime_error"
    COMPILE_ERROR = "compile_error"
    INFRA_ERROR = "infra_error"


class FinishReason(enum.StrEnum):
    """Why generation ended: the model said so (``STOP``) or the token budget did (``LENGTH``)."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One verifiable question.

    Attributes:
        id: Stable identifier, unique within its source.
        text: What the tokenizer encodes; a chat template, if any, has already been applied.
        kind: Which checker judges the response (``"math"``, ``"countdown"``).
        spec: What that checker needs, such as ``{"answer": "42"}``. Never shown to the policy.
    """

    id: str
    text: str
    kind: str
    spec: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are drawn. The policy optimised is the one sampled from: no top-k or top-p truncation.

    Attributes:
        temperature: Divides the logits; must be positive.
        max_new_tokens: Longest response in tokens, end-of-sequence included.
        samples_per_prompt: Responses drawn for each prompt (the group size G).
        seed: With the prompt's position it fixes every random draw, whatever the number of ranks or engines.
    """

    temperature: float
    max_new_tokens: int
    samples_per_prompt: int
    seed: int


@dataclass(slots=True)
class Sample:
    """One response to one prompt, as an engine returns it.

    Attributes:
        group: Position of the prompt in the step's prompt list; samples of one prompt share it.
        prompt_ids: Token ids of the prompt.
        response_ids: Token ids of the response, with the end-of-sequence token when the model produced it.
        logprobs: The engine's log-probability (nats) of each response token, same length as ``response_ids``.
        text: The decoded response without special tokens; this is what the verifier sees.
        finish_reason: Why generation ended.
        weight_version: Version of the weights that made the response; its oldest token's where they changed meanwhile.
        version_spans: ``(version, start, end)`` for consecutive runs of response tokens, where an engine reports them;
            empty means ``weight_version`` throughout.
    """

    group: int
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    weight_version: int
    version_spans: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The samples of one step as tensors, identical on every rank. Rows are right-padded with ``pad_id``.

    Attributes:
        tokens_BL: Prompt and response ids, ``int64``.
        response_mask_BL: True where the token at that position belongs to a response, ``bool``.
        rollout_logprobs_BL: The engine's log-probabilities at those positions, 0 elsewhere, ``float32``.
        groups_B: Prompt index of each row, ``int64``.
        rewards_B: 1 for an accepted response, else 0, ``float32``.
        valid_B: False for rows without a verdict (``infra_error``); they take no part in the update, ``bool``.
        versions_BL: Version of the weights that made the response token at that position, 0 elsewhere, ``int32``.
        truncated_B: True where the token budget ended the response, ``bool``.
    """

    tokens_BL: torch.Tensor
    response_mask_BL: torch.Tensor
    rollout_logprobs_BL: torch.Tensor
    groups_B: torch.Tensor
    rewards_B: torch.Tensor
    valid_B: torch.Tensor
    versions_BL: torch.Tensor
    truncated_B: torch.Tensor

    def __len__(self) -> int:
        """Number of rows."""
        return self.tokens_BL.shape[0]

    @staticmethod
    def from_samples(samples: Sequence[Sample], pad_id: int) -> RolloutBatch:
        """Pad ``samples`` to a common length; rewards are 0 and every row is valid until verdicts arrive.

        Raises:
            RLVRError: If ``samples`` is empty, or a prompt or response has no tokens.
        """
        if not samples:
            raise RLVRError("the rollout returned no samples; check the engine's log and rollout.* settings")
        length = max(len(sample.prompt_ids) + len(sample.response_ids) for sample in samples)
        tokens_BL = torch.full((len(samples), length), pad_id, dtype=torch.long)
        mask_BL = torch.zeros(len(samples), length, dtype=torch.bool)
        logprobs_BL = torch.zeros(len(samples), length)
        versions_BL = torch.zeros(len(samples), length, dtype=torch.int32)
        for row, sample in enumerate(samples):
            start, end = len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.response_ids)
            if start == 0 or end == start or len(sample.logprobs) != end - start:
                raise RLVRError(
                    f"a sample of prompt {sample.group} has {start} prompt tokens, {end - start} response tokens and "
                    f"{len(sample.logprobs)} log-probs; it needs at least one of each and a log-prob per response token"
                )
            tokens_BL[row, :end] = torch.tensor(sample.prompt_ids + sample.response_ids)
            mask_BL[row, start:end] = True
            logprobs_BL[row, start:end] = torch.tensor(sample.logprobs)
            versions_BL[row, start:end] = sample.weight_version
            for version, first, last in sample.version_spans:
                versions_BL[row, start + first : start + last] = version
        return RolloutBatch(
            tokens_BL=tokens_BL,
            response_mask_BL=mask_BL,
            rollout_logprobs_BL=logprobs_BL,
            groups_B=torch.tensor([sample.group for sample in samples]),
            rewards_B=torch.zeros(len(samples)),
            valid_B=torch.ones(len(samples), dtype=torch.bool),
            versions_BL=versions_BL,
            truncated_B=torch.tensor([sample.finish_reason is FinishReason.LENGTH for sample in samples]),
        )

    def with_verdicts(self, verdicts: Sequence[Verdict]) -> RolloutBatch:
        """The same rows with rewards and validity taken from ``verdicts`` (one per row)."""
        if len(verdicts) != len(self):
            raise ValueError(f"{len(verdicts)} verdicts for {len(self)} rows")
        return replace(
            self,
            rewards_B=torch.tensor([float(verdict is Verdict.ACCEPTED) for verdict in verdicts]),
            valid_B=torch.tensor([verdict is not Verdict.INFRA_ERROR for verdict in verdicts]),
        )


@dataclass(slots=True)
class StepMetrics:
    """Sums and counts collected during one step; divided only when read, so that layouts cannot change a mean."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Add ``total`` over ``count`` items to the metric ``name``."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.counts[name] = self.counts.get(name, 0.0) + float(count)

    def means(self) -> dict[str, float]:
        """Every metric's mean; metrics without items are left out."""
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name] > 0}
