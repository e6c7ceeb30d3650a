"""The policy: log-probs and entropy of given rows, optimizer updates on them, and its weights as a stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_rlvr.config import PolicyConfig
from megatron_rlvr.core import RLVRError, StepMetrics
from megatron_rlvr.objective import LossInputs, LossOutputs, Metrics, Objective
from megatron_rlvr.policy import model as megatron
from megatron_rlvr.policy import parallel, precision
from megatron_rlvr.policy.gpu_memory import move_optimizer_state
from megatron_rlvr.policy.hf_weights import TensorReader, WeightMap, load_weights, named_full_tensors, read_hf_config
from megatron_rlvr.policy.micro_batches import Cut, MicroBatch, TrainingRows, cut_micro_batch, deal
from megatron_rlvr.vocab import TokenStats, linear_policy_loss, linear_token_stats

__all__ = ["Policy", "TokenPass", "TrainingRows"]


@dataclass(frozen=True, slots=True)
class TokenPass:
    """What a pass without gradients says of response tokens, ``float32`` on the CPU, 0 elsewhere.

    Attributes:
        logprobs_BL: Log-probability (nats) of each response token.
        entropy_BL: Entropy (nats) of the distribution it was drawn from.
        nucleus_BL: Entropy of that distribution's top-p nucleus, where asked for.
    """

    logprobs_BL: torch.Tensor
    entropy_BL: torch.Tensor
    nucleus_BL: torch.Tensor | None = None


class Policy:
    """A Megatron-Core model on this rank with its optimizer. Every method is a collective call over all ranks.

    Requires `parallel.initialize` to have been called.
    """

    def __init__(
        self, config: PolicyConfig, *, temperature: float, total_steps: int, keep_reference: bool = False
    ) -> None:
        """Build the model of ``config.model`` and load its weights.

        Args:
            config: Model, layout and optimizer settings.
            temperature: Sampling temperature; log-probs and entropies are those of the sampled distribution. Set the
                attribute when it changes.
            total_steps: Rollout steps that the learning-rate schedule spans.
            keep_reference: Keep a copy of the loaded weights on the CPU for `reference_log_probs`.

        Raises:
            RLVRError: If the model cannot be read or does not fit the layout.
        """
        self.config = config
        self.temperature = temperature
        self.hf_config = read_hf_config(config.model)
        megatron.check_passthrough(config.megatron)
        reader = TensorReader(config.model)
        self.models = megatron.build_models(config, self.hf_config)
        self.modules = [megatron.unwrapped(model) for model in self.models]
        self._tp_group = megatron.tensor_parallel_group()
        self._weights = WeightMap(self.hf_config)
        rank, parts = dist.get_rank(self._tp_group), dist.get_world_size(self._tp_group)
        for module in self.modules:
            load_weights(module, self._weights, reader, rank=rank, parts=parts)
        self._reference = [weight.detach().cpu().clone() for weight in self._parameters()] if keep_reference else None
        self.optimizer, self.schedule = megatron.build_optimizer(config, self.models, total_steps)

    def log_probs(self, tokens_BL: torch.Tensor, mask_BL: torch.Tensor, *, nucleus: float | None = None) -> TokenPass:
        """Log-probability of every response token and entropy of the distribution it was drawn from, no gradients.

        Args:
            tokens_BL: Token ids of the whole batch on every rank.
            mask_BL: True at response tokens.
            nucleus: Top-p of the nucleus whose entropy is wanted too; None for none.

        Returns:
            The statistics, equal on every rank whatever the layout.
        """
        with torch.no_grad():
            micro_batches, parts = self._run(TrainingRows(tokens_BL, mask_BL, {}), objective=None, nucleus=nucleus)
        values = torch.zeros(2 if nucleus is None else 3, *tokens_BL.shape, device=parallel.device())
        if self._reports:
            for batch, stats in zip(micro_batches, parts, strict=True):
                found = [stats.logprob, stats.entropy, *([] if nucleus is None else [stats.nucleus_entropy])]
                values[:, batch.rows_R, batch.columns_R] = torch.stack(found).float()
        # One rank knows a token and all others add 0, which leaves its bits as they are.
        dist.all_reduce(values)
        return TokenPass(*values.cpu())

    def reference_log_probs(self, tokens_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """`log_probs` under the weights that ``policy.model`` names, ``[B, L]``; needs ``keep_reference``."""
        self._swap_reference()
        try:
            return self.log_probs(tokens_BL, mask_BL).logprobs_BL
        finally:
            self._swap_reference()

    def _swap_reference(self) -> None:
        assert self._reference is not None, "the policy was built without keep_reference"
        self.settle()
        with torch.no_grad():
            for parameter, kept in zip(self._parameters(), self._reference, strict=True):
                current = parameter.detach().clone()
                parameter.copy_(kept)
                kept.copy_(current)

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return (parameter for module in self.modules for parameter in module.parameters())

    def settle(self) -> None:
        """Wait for what an update leaves to be done beside the next one: without it the weights may be old ones."""
        for model in self.models:
            if model.ddp_config.overlap_param_gather:
                model.start_param_sync(force_sync=True)

    def update(self, rows: TrainingRows, objective: Objective, metrics: StepMetrics) -> None:
        """One optimizer update on a global mini-batch: the gradient of the token-mean of ``objective`` over ``rows``.

        Args:
            rows: The mini-batch; its number of rows has to be a multiple of the data-parallel size.
            objective: What to minimise.
            metrics: Receives this rank's sums and counts; reduce them with `reduce_metrics` at the end of the step.

        Raises:
            RLVRError: On every rank, if the gradient is not finite; the weights are then lost. If the objective needs
                whole sequences and context parallelism cuts them.
        """
        if not objective.separable and self.config.context_parallel > 1:
            raise RLVRError(
                f"the objective compares the tokens of a sequence, which policy.context_parallel="
                f"{self.config.context_parallel} splits; set it to 1 or choose an objective of single tokens"
            )
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        for reduced in self._run(rows, objective)[1]:
            for name, (total, count) in reduced.items():
                metrics.add(name, float(total), float(count))
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise RLVRError(
                f"the gradient norm of an update is {float(grad_norm)}; resume from the last checkpoint, and lower "
                "policy.learning_rate if it happens again"
            )
        # Every rank sees the same norm; one share each keeps the reduced mean right.
        metrics.add("grad_norm", float(grad_norm), 1.0)

    def updating(self) -> AbstractContextManager[None]:
        """Wraps a step's updates; outside, ``policy.offload_optimizer`` keeps the optimizer's state on the host."""
        return self._optimizer_at_hand() if self.config.offload_optimizer else nullcontext()

    @contextmanager
    def _optimizer_at_hand(self) -> Iterator[None]:
        move_optimizer_state(self.optimizer, parallel.device())
        yield
        move_optimizer_state(self.optimizer, torch.device("cpu"))

    def step_schedule(self) -> None:
        """Advance the learning rate by one rollout step."""
        self.schedule.step(1)

    @property
    def learning_rate(self) -> float:
        """The current learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The current weights under Hugging Face names, gathered one by one; see `named_full_tensors`."""
        self.settle()
        return named_full_tensors(self.modules, self._weights, self._tp_group, megatron.pipeline_parallel_group())

    def reduce_metrics(self, metrics: StepMetrics) -> StepMetrics:
        """Sums and counts added up over the ranks that see different tokens, on every rank.

        The last pipeline stage has the loss, so its names and values count.
        """
        group = megatron.pipeline_parallel_group()
        names = [sorted(metrics.sums)]
        dist.broadcast_object_list(names, group=group, group_src=group.size() - 1)
        rows = [[metrics.sums[name], metrics.counts[name]] if self._reports else [0.0, 0.0] for name in names[0]]
        values = torch.tensor(rows, dtype=torch.float64, device=parallel.device())
        dist.all_reduce(values)
        reduced = StepMetrics()
        for name, (total, count) in zip(names[0], values.tolist(), strict=True):
            reduced.add(name, total, count)
        return reduced

    @property
    def _reports(self) -> bool:
        """Whether this rank speaks for its tokens: of the ranks that share them, one has the statistics and does."""
        return parallel_state.is_pipeline_last_stage() and dist.get_rank(self._tp_group) == 0

    def _run(
        self, rows: TrainingRows, objective: Objective | None, nucleus: float | None = None
    ) -> tuple[list[MicroBatch], list[Any]]:
        """Send this rank's rows through Megatron's schedule in micro-batches, backwards too if there is an objective.

        Returns the micro-batches and, on the last pipeline stage, what `_loss` reports for each.
        """
        config = self.config
        context = parallel_state.get_context_parallel_group()
        cut = Cut(
            context=context.size(),
            rank=context.rank(),
            tensor=config.tensor_parallel if config.sequence_parallel else 1,
            slots=precision.row_multiple(config),
        )
        members = deal(
            rows.lengths(),
            parts=parallel_state.get_data_parallel_world_size(),
            rank=parallel_state.get_data_parallel_rank(),
            rows=config.micro_batch,
            tokens=config.micro_batch_tokens,
            # What the interleaved schedule asks for.
            multiple=config.pipeline_parallel if config.virtual_pipeline > 1 else 1,
        )
        packed = config.micro_batch_tokens > 0
        micro_batches = [cut_micro_batch(rows, some, cut, packed=packed) for some in members]
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, loss=partial(self._loss, objective, nucleus)),
            data_iterator=[iter(micro_batches) for _ in self.models],
            model=self.models,
            num_microbatches=len(micro_batches),
            seq_length=rows.tokens_BL.shape[1],
            micro_batch_size=config.micro_batch,
            forward_only=objective is None,
            collect_non_loss_data=objective is None,
        )
        return micro_batches, results

    def _forward_step(
        self, micro_batches: Iterator[MicroBatch], model: torch.nn.Module, *, loss: Callable[..., Any]
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(micro_batches)
        device = parallel.device()
        options: dict[str, Any] = {}
        if batch.lengths is not None:
            ends = torch.tensor([0, *batch.lengths], device=device).cumsum(0).to(torch.int32)
            options["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=ends,
                cu_seqlens_kv=ends,
                max_seqlen_q=max(batch.lengths),
                max_seqlen_kv=max(batch.lengths),
            )
        if precision.half(self.config):
            # Without it the wrapper for half precision would widen the hidden states.
            options["fp32_output"] = False
        hidden_BSH = model(batch.tokens_BS.to(device), batch.positions_BS.to(device), None, **options)
        return hidden_BSH, partial(loss, batch)

    def _loss(
        self,
        objective: Objective | None,
        nucleus: float | None,
        batch: MicroBatch,
        hidden_BSH: torch.Tensor,
        non_loss_data: bool = False,
    ) -> Any:
        """Megatron's loss contract: the statistics themselves, or (summed loss, number of tokens, metrics)."""
        device = hidden_BSH.device
        hidden_TH = hidden_BSH.flatten(0, 1)
        targets_R = batch.targets_R.to(device)
        weight_VH = megatron.output_weight(self.modules[-1])
        head: dict[str, Any] = {
            "rows": batch.heads_R.to(device),
            "group": self._tp_group,
            "temperature": self.temperature,
            "vocab_size": int(self.hf_config["vocab_size"]),
            "sequence_parallel": self.config.sequence_parallel,
        }
        if non_loss_data or objective is None:
            return linear_token_stats(hidden_TH, weight_VH, targets_R, nucleus=nucleus, **head)
        given = {name: value_R.to(device) for name, value_R in (batch.given | {"sequence": batch.rows_R}).items()}
        parts: list[LossOutputs] = []

        def token_loss(stats: TokenStats, chunk: slice) -> torch.Tensor:
            more = {name: value_R[chunk] for name, value_R in given.items()}
            if stats.extras is not None:
                more["entropy_slope"] = stats.extras.entropy_slope
                more["entropy_grad_norm"] = stats.extras.entropy_grad_norm
            if stats.nucleus_entropy is not None:
                more["nucleus_entropy"] = stats.nucleus_entropy
            mask_R = torch.ones_like(stats.logprob, dtype=torch.bool)
            parts.append(objective.loss(LossInputs(stats.logprob, entropy=stats.entropy, mask=mask_R, **more)))
            return parts[-1].losses

        # DistributedDataParallel gives every parameter the buffer that gradients are accumulated and reduced in.
        in_place = objective.separable and weight_VH.main_grad.dtype == torch.float32  # type: ignore[attr-defined]
        out = linear_policy_loss(
            hidden_TH,
            weight_VH,
            targets_R,
            token_loss,
            separable=objective.separable,
            extras=objective.slope,
            nucleus=objective.nucleus,
            main_grad=in_place,
            **head,
        )
        metrics: Metrics = {
            name: (_sum(part.metrics[name][0] for part in parts), _sum(part.metrics[name][1] for part in parts))
            for name in parts[0].metrics
        }
        return out.loss, _sum(part.count for part in parts).to(torch.int), metrics


def _sum(values: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of 0-d tensors."""
    return torch.stack(list(values)).sum()
