"""The policy: log-probs and entropy of given rows, optimizer updates on them, and its weights as a stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_rlvr.config import PolicyConfig
from megatron_rlvr.core import RLVRError, StepMetrics
from megatron_rlvr.objective import LossInputs, LossOutputs, Metrics
from megatron_rlvr.policy import model as megatron
from megatron_rlvr.policy import parallel
from megatron_rlvr.policy.hf_weights import TensorReader, WeightMap, load_weights, named_full_tensors, read_hf_config
from megatron_rlvr.vocab import TokenStats, linear_policy_loss, linear_token_stats

Objective = Callable[[LossInputs], LossOutputs]


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Rows of a global (mini-)batch, identical on every rank.

    Attributes:
        tokens_BL: Token ids, right-padded, ``int64``.
        mask_BL: True at response tokens that take part in the loss, ``bool``.
        old_logprobs_BL: Log-probs under the policy before the step's first update, 0 outside responses, ``float32``.
        advantages_BL: Advantage of every token, ``float32``.
    """

    tokens_BL: torch.Tensor
    mask_BL: torch.Tensor
    old_logprobs_BL: torch.Tensor
    advantages_BL: torch.Tensor

    def select(self, rows: torch.Tensor) -> TrainingRows:
        """The rows with the given indices or slice mask."""
        return TrainingRows(*(getattr(self, entry.name)[rows] for entry in fields(self)))

    def trimmed(self) -> TrainingRows:
        """The same rows without the columns after their last response token (causal attention never sees them)."""
        used = self.mask_BL.any(0).nonzero()
        length = int(used[-1]) + 1 if len(used) else 2
        return TrainingRows(*(getattr(self, entry.name)[:, :length] for entry in fields(self)))


class Policy:
    """A Megatron-Core model on this rank with its optimizer. Every method is a collective call over all ranks.

    Requires `parallel.initialize` to have been called.
    """

    def __init__(self, config: PolicyConfig, *, temperature: float, total_steps: int) -> None:
        """Build the model of ``config.model`` and load its weights.

        Args:
            config: Model, layout and optimizer settings.
            temperature: Sampling temperature; log-probs and entropies are those of the sampled distribution.
            total_steps: Rollout steps that the learning-rate schedule spans.

        Raises:
            RLVRError: If the model cannot be read or does not fit the layout.
        """
        self.config = config
        self.temperature = temperature
        self.hf_config = read_hf_config(config.model)
        megatron.check_passthrough(config.megatron)
        reader = TensorReader(config.model)
        self.model = megatron.build_model(config, self.hf_config)
        self.module = megatron.unwrapped(self.model)
        self._tp_group = megatron.tensor_parallel_group()
        self._dp_group = megatron.data_parallel_group()
        self._weights = WeightMap(self.hf_config)
        rank, parts = dist.get_rank(self._tp_group), dist.get_world_size(self._tp_group)
        load_weights(self.module, self._weights, reader, rank=rank, parts=parts)
        self.optimizer, self.schedule = megatron.build_optimizer(config, self.model, total_steps)

    def log_probs(self, tokens_BL: torch.Tensor, mask_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of every response token and entropy of the distribution it was drawn from, no gradients.

        Args:
            tokens_BL: Token ids of the whole batch on every rank.
            mask_BL: True at response tokens.

        Returns:
            ``(logprobs_BL, entropy_BL)`` in nats, ``float32`` on the CPU, 0 where ``mask_BL`` is False; equal on every
            rank whatever the layout.
        """
        zeros_BL = torch.zeros(tokens_BL.shape)
        share = self._data_parallel_share(TrainingRows(tokens_BL, mask_BL, zeros_BL, zeros_BL))
        with torch.no_grad():
            parts = self._run(share, objective=None)
        values_2BL = torch.zeros(2, *share.tokens_BL.shape)
        for start, stats in zip(range(0, len(share.tokens_BL), self.config.micro_batch), parts, strict=True):
            rows = share.mask_BL[start : start + self.config.micro_batch]
            for value_BL, stat_T in zip(values_2BL, (stats.logprob, stats.entropy), strict=True):
                value_BL[start : start + len(rows)][rows] = stat_T.float().cpu()
        return self._gather_rows(values_2BL[0]), self._gather_rows(values_2BL[1])

    def update(self, rows: TrainingRows, objective: Objective, metrics: StepMetrics) -> None:
        """One optimizer update on a global mini-batch: the gradient of the token-mean of ``objective`` over ``rows``.

        Args:
            rows: The mini-batch; its number of rows has to be a multiple of the data-parallel size.
            objective: Gives the summed loss and the count that the global sum is divided by.
            metrics: Receives this rank's sums and counts; reduce them with `reduce_metrics` at the end of the step.

        Raises:
            RLVRError: On every rank, if the gradient is not finite; the weights are then lost.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        for reduced in self._run(self._data_parallel_share(rows), objective):
            for name, (total, count) in reduced.items():
                metrics.add(name, float(total), float(count))
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise RLVRError(
                f"the gradient norm of an update is {float(grad_norm)}; resume from the last checkpoint, and lower "
                "policy.learning_rate if it happens again"
            )
        # Every data-parallel rank sees the same norm; one share each keeps the reduced mean right.
        metrics.add("grad_norm", float(grad_norm), 1.0)

    def step_schedule(self) -> None:
        """Advance the learning rate by one rollout step."""
        self.schedule.step(1)

    @property
    def learning_rate(self) -> float:
        """The current learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The current weights under Hugging Face names, gathered one by one; see `named_full_tensors`."""
        return named_full_tensors(self.module, self._weights, self._tp_group)

    def reduce_metrics(self, metrics: StepMetrics) -> StepMetrics:
        """Sums and counts added up over the data-parallel ranks; every rank must have the same names."""
        names = sorted(metrics.sums)
        values = torch.tensor([[metrics.sums[name], metrics.counts[name]] for name in names], dtype=torch.float64)
        values = values.to(parallel.device())
        dist.all_reduce(values, group=self._dp_group)
        rows = values.tolist()
        return StepMetrics(
            sums={name: row[0] for name, row in zip(names, rows, strict=True)},
            counts={name: row[1] for name, row in zip(names, rows, strict=True)},
        )

    def _data_parallel_share(self, rows: TrainingRows) -> TrainingRows:
        size, rank = dist.get_world_size(self._dp_group), dist.get_rank(self._dp_group)
        share = len(rows.tokens_BL) // size
        if share * size != len(rows.tokens_BL):
            raise ValueError(f"{len(rows.tokens_BL)} rows do not split over {size} data-parallel ranks")
        return rows.select(torch.arange(rank * share, (rank + 1) * share))

    def _gather_rows(self, share_BL: torch.Tensor) -> torch.Tensor:
        size = dist.get_world_size(self._dp_group)
        if size == 1:
            return share_BL
        local = share_BL.to(parallel.device())
        parts = [torch.empty_like(local) for _ in range(size)]
        dist.all_gather(parts, local, group=self._dp_group)
        return torch.cat(parts).cpu()

    def _run(self, share: TrainingRows, objective: Objective | None) -> list[Any]:
        """Send this rank's rows through Megatron's schedule in micro-batches, backwards too if there is an objective.

        Returns what `_loss` reports for each micro-batch.
        """
        micro_batches = [
            share.select(indices).trimmed()
            for indices in torch.split(torch.arange(len(share.tokens_BL)), self.config.micro_batch)
        ]
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, objective=objective),
            data_iterator=iter(micro_batches),
            model=self.model,
            num_microbatches=len(micro_batches),
            seq_length=share.tokens_BL.shape[1],
            micro_batch_size=self.config.micro_batch,
            forward_only=objective is None,
            collect_non_loss_data=objective is None,
        )
        return results

    def _forward_step(
        self, micro_batches: Iterator[TrainingRows], model: torch.nn.Module, *, objective: Objective | None
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        rows = next(micro_batches)
        device = parallel.device()
        tokens_BL = rows.tokens_BL.to(device)
        positions_BL = torch.arange(tokens_BL.shape[1], device=device).expand_as(tokens_BL)
        # Without fp32_output=False the wrapper for half precision would widen the hidden states.
        half = {"fp32_output": False} if self.config.precision == "bf16" else {}
        hidden_BLH = model(tokens_BL, positions_BL, None, **half)
        return hidden_BLH, partial(self._loss, rows, objective)

    def _loss(
        self, rows: TrainingRows, objective: Objective | None, hidden_BLH: torch.Tensor, non_loss_data: bool = False
    ) -> Any:
        """Megatron's loss contract: the statistics themselves, or (summed loss, number of tokens, metrics).

        Response tokens count in row-major order; the hidden state at L predicts the token at L + 1.
        """
        device = hidden_BLH.device
        predicted_BL = torch.nn.functional.pad(rows.mask_BL[:, 1:], (0, 1))
        hidden_TH = hidden_BLH.flatten(0, 1)
        targets_R = rows.tokens_BL[rows.mask_BL].to(device)
        weight_VH = megatron.output_weight(self.module)
        head: dict[str, Any] = {
            "rows": predicted_BL.flatten().nonzero().squeeze(1).to(device),
            "group": self._tp_group,
            "temperature": self.temperature,
            "vocab_size": int(self.hf_config["vocab_size"]),
        }
        if non_loss_data or objective is None:
            return linear_token_stats(hidden_TH, weight_VH, targets_R, **head)
        old_R, advantages_R = rows.old_logprobs_BL[rows.mask_BL].to(device), rows.advantages_BL[rows.mask_BL].to(device)
        parts: list[LossOutputs] = []

        def token_loss(stats: TokenStats, chunk: slice) -> torch.Tensor:
            mask_R = torch.ones_like(stats.logprob, dtype=torch.bool)
            parts.append(objective(LossInputs(stats.logprob, old_R[chunk], advantages_R[chunk], stats.entropy, mask_R)))
            return parts[-1].losses

        # DistributedDataParallel gives every parameter the buffer that gradients are accumulated and reduced in.
        in_place = weight_VH.main_grad.dtype == torch.float32  # type: ignore[attr-defined]
        out = linear_policy_loss(hidden_TH, weight_VH, targets_R, token_loss, main_grad=in_place, **head)
        metrics: Metrics = {
            name: (_sum(part.metrics[name][0] for part in parts), _sum(part.metrics[name][1] for part in parts))
            for name in parts[0].metrics
        }
        return out.loss, _sum(part.count for part in parts).to(torch.int), metrics


def _sum(values: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of 0-d tensors."""
    return torch.stack(list(values)).sum()
