"""The loop: every step is rollout → verify → prepare → update ×N → resync → report, on every rank alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_rlvr.config import Config, ConfigError
from megatron_rlvr.core import Prompt, RLVRError, RolloutBatch, Sample, SamplingParams, StepMetrics, Verdict
from megatron_rlvr.data import PromptSampler, open_prompts
from megatron_rlvr.entropy import Actuation, Attribution
from megatron_rlvr.objective import Cause, diagnose
from megatron_rlvr.policy import parallel
from megatron_rlvr.policy.hf_export import export_hf
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.report import RunRecorder
from megatron_rlvr.rollout import derive_seed, load_tokenizer, pad_id
from megatron_rlvr.training import checkpoint
from megatron_rlvr.training.collection import Collector
from megatron_rlvr.training.composition import compose_run
from megatron_rlvr.training.engines import EmbeddedRollouts, FleetRollouts, Rollouts, open_fleet, raise_first
from megatron_rlvr.training.phases import (
    PreparedBatch,
    evaluate,
    handle_overlong,
    minibatches,
    prepare,
    record_ages,
    token_ages,
    weigh,
)
from megatron_rlvr.training.run_directory import RunDirectory
from megatron_rlvr.verify import VerifierClient, local_service

T = TypeVar("T")

# Streams of random numbers, one per use; a step's seed is derived from (run.seed, stream, step).
_ROLLOUT, _MINIBATCHES, _EVALUATION, _TOKEN_RULE = range(4)

# Other ranks may wait for rank 0 as long as the longest rollout takes; if it dies, the launcher ends them.
_PATIENCE = timedelta(days=1)


class Trainer:
    """One rank of a training run. Use as a context manager; all ranks call the same methods in the same order."""

    def __init__(self, config: Config) -> None:
        """Join the other ranks, load everything and resume from the last checkpoint if there is one.

        Args:
            config: The resolved configuration, the same on every rank.

        Raises:
            RLVRError: On what the user can mend: a missing model, an unreachable service, a damaged checkpoint.
            ConfigError: If the run directory holds a run of another configuration.
        """
        self._resources = contextlib.ExitStack()
        self.config = config
        self.directory = RunDirectory(config.run.dir)
        policy, run, rollout = config.policy, config.run, config.rollout
        parallel.initialize(
            tensor_parallel=policy.tensor_parallel,
            data_parallel=policy.data_parallel,
            pipeline_parallel=policy.pipeline_parallel,
            virtual_pipeline=policy.virtual_pipeline,
            context_parallel=policy.context_parallel,
            seed=run.seed,
        )
        self._resources.callback(parallel.shutdown)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        # Python objects travel over gloo, beside NCCL where that carries the tensors.
        self.object_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.on_rank_0(lambda: self.directory.open(config))
        tokenizer = load_tokenizer(policy.model)
        chat_template = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        prompts = open_prompts(config.data.train, chat_template=chat_template)
        self.heldout = (
            open_prompts(config.data.heldout, chat_template=chat_template)[: config.evaluation.prompts]
            if config.data.heldout
            else []
        )
        self.composition = compose_run(config, len(prompts))
        self.control = self.composition.recipe.control
        self.attribution = Attribution()
        self.policy_entropy: float | None = None  # of the last step's updates
        self.policy = Policy(
            policy,
            temperature=rollout.temperature,
            total_steps=run.steps,
            keep_reference=config.objective.kl > 0.0,
        )
        self.rollouts = self._open_rollouts(tokenizer)
        self.collector = Collector(
            config,
            self.rollouts,
            PromptSampler(prompts, run.seed),
            judge=self._judge,
            on_rank_0=self.on_rank_0,
            seed=lambda step: derive_seed(run.seed, _ROLLOUT, step),
            pad_id=pad_id(tokenizer),
        )
        self.step, relaid = checkpoint.resume(self)
        self._checkpointer = checkpoint.Checkpointer(self)
        self.on_rank_0(lambda: self._open_services(relaid))

    def _open_services(self, relaid: str | None) -> None:
        """What only rank 0 has: the verifier and the run's records."""
        verify = self.config.verify
        url = verify.url or self._resources.enter_context(local_service())
        client = VerifierClient(url, deadline_s=verify.deadline_s, max_infra_error_share=verify.max_infra_error_share)
        self._verifier = self._resources.enter_context(client)
        self.directory.truncate_records(self.step)
        recorder = RunRecorder(self.directory.path, total_steps=self.config.run.steps, first_step=self.step)
        self._recorder = self._resources.enter_context(recorder)
        self._recorder.note(self.step, "resumed in another layout", relaid)

    def __enter__(self) -> Trainer:
        """The trainer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop what was started, last first."""
        self._resources.close()

    def run(self) -> None:
        """Train to the last step, evaluate, export the model."""
        self._resync(version=self.step)
        if self.step == 0:
            self._evaluate()
        while self.step < self.config.run.steps:
            self._train_step()
            self._checkpointer.poll()
            last = self.step == self.config.run.steps
            every = self.config.evaluation.every
            if last or (every and self.step % every == 0):
                self._evaluate()
            if last or self.step % self.config.run.checkpoint_every == 0:
                self._checkpointer.save(wait=last or not self.config.run.async_checkpoint)
        export_hf(self.policy, self.directory.model)

    def _open_rollouts(self, tokenizer: PreTrainedTokenizerBase) -> Rollouts:
        if self.config.rollout.engine == "embedded":
            return EmbeddedRollouts(self.config, tokenizer, self.object_group, self.on_rank_0)
        fleets: list[Any] = []
        # no result that could be sent
        self.on_rank_0(lambda: fleets.append(self._resources.enter_context(open_fleet(self.config, tokenizer))))
        rollouts = FleetRollouts(fleets[0] if fleets else None, self.on_rank_0)
        self._resources.callback(rollouts.close)
        return rollouts

    def _resync(self, version: int) -> None:
        """Bring the engines to the policy's weights."""
        self.rollouts.resync(self.policy.named_tensors(), version)

    def _train_step(self) -> None:
        metrics, seconds = StepMetrics(), dict[str, float]()
        started = time.perf_counter()
        with _timed(seconds, "wait"):
            collected = self.collector.take(self.step, self.control.next_temperature(self.config.rollout.temperature))
        self.policy.temperature = collected.temperature
        assert collected.batch is not None
        batch = handle_overlong(collected.batch, self.config.rollout)
        ages_BL = token_ages(batch, self.step, self.config.rollout.max_staleness)
        with _timed(seconds, "prepare"):
            prepared = self._prepare(batch, metrics)
        record_ages(batch, ages_BL, prepared.stats, metrics)
        steered_by = self.policy_entropy if self.control.signal == "policy" else prepared.signal
        learning_rate, actuation = self.policy.learning_rate, self.control.decide(steered_by)
        change = self.attribution.observe(prepared.entropy)
        with _timed(seconds, "update"):
            self._update(prepared, actuation, metrics)
        self.policy.step_schedule()
        with _timed(seconds, "resync"):
            self._resync(version=self.step + 1)
        means = self.policy.reduce_metrics(metrics).means()
        self.policy_entropy = means["policy_entropy"]
        shares = self.attribution.record(means, learning_rate)
        if self.rank == 0:
            total = time.perf_counter() - started
            self._recorder.record_step(
                {
                    "step": self.step,
                    "epoch": collected.epoch,
                    **self._controlled(actuation),
                    "learning_rate": learning_rate,
                    **means,
                    **change,
                    **shares,
                    **collected.metrics.means(),
                    "tokens_per_s": collected.metrics.sums["response_tokens"] / total,
                    **{f"seconds/{phase}": value for phase, value in (collected.seconds | seconds).items()},
                    "seconds/total": total,
                }
            )
            self._note(prepared, batch, ages_BL, means)
        self.step += 1

    def _prepare(self, batch: RolloutBatch, metrics: StepMetrics) -> PreparedBatch:
        tokens_BL, mask_BL, composition = batch.tokens_BL, batch.response_mask_BL, self.composition
        return prepare(
            batch,
            self.policy.log_probs(tokens_BL, mask_BL, nucleus=composition.recipe.nucleus),
            metrics,
            recipe=composition.recipe,
            correction=composition.mismatch,
            reference_BL=self.policy.reference_log_probs(tokens_BL, mask_BL) if composition.loss.kl > 0.0 else None,
        )

    def _controlled(self, actuation: Actuation) -> dict[str, float]:
        """What entropy control did in this step, for the records."""
        optional = {
            "signal": self.control.smoothed,
            "target": self.control.target,
            "temperature": actuation.temperature,
        }
        optional |= {"clip_low": actuation.clip_low, "clip_high": actuation.clip_high}
        return {
            "positive_weight": actuation.positive_weight,
            "control/value": self.control.value,
            "control/negative_weight": actuation.negative_weight,
            "control/bonus": actuation.bonus,
            "control/gain": actuation.gain,
            "control/fallback": self.control.fallback_value,
            **{f"control/{name}": value for name, value in optional.items() if value is not None},
            "saturated_low": self.control.saturated_low,
            "saturated_high": self.control.saturated_high,
        }

    def _note(
        self, prepared: PreparedBatch, batch: RolloutBatch, ages_BL: torch.Tensor, means: dict[str, float]
    ) -> None:
        """Say in words what a user should look at: a controller that can do no more, an engine that disagrees."""
        self._recorder.note(self.step, "entropy control", self.control.alarm)
        # the rounding of log-probs themselves, of which fp32 has little and bf16 much
        eps = torch.finfo(torch.float32 if self.config.policy.precision == "fp32" else torch.bfloat16).eps
        finding: str | None = None
        if means["rollout_trainer_gap_max"] > (tolerance := max(1e-3, 32 * eps)):
            stats = prepared.stats
            mask_BL = stats.mask_BL & (ages_BL == 0)  # older tokens differ because the policy has moved on
            diagnosis = diagnose(
                stats.logprob_BL[mask_BL],
                batch.rollout_logprobs_BL[mask_BL],
                stats.entropy_BL[mask_BL],
                versions=set(batch.versions_BL[mask_BL].tolist()),
                expected_version=self.step,
                eps=eps,
                tolerance=tolerance,
            )
            if diagnosis.cause is not Cause.NONE:
                finding = f"{diagnosis.cause}: {diagnosis.sentence}"
        self._recorder.note(self.step, "engine and trainer disagree", finding)

    def _judge(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[Verdict]:
        return self._verifier.verify([(prompts[sample.group], sample.text) for sample in samples])

    def _update(self, prepared: PreparedBatch, actuation: Actuation, metrics: StepMetrics) -> None:
        composition, objective = self.composition, self.config.objective
        rows = weigh(
            prepared,
            composition.estimator(prepared.outcomes),
            composition.recipe.rule,
            metrics,
            gain=actuation.gain,
            seed=self._seed(_TOKEN_RULE),
        )
        parts = minibatches(
            rows, prepared.groups_B, objective, self._seed(_MINIBATCHES), aggregation=composition.aggregation
        )
        with self.policy.updating():
            for age, part in enumerate(parts, start=1):
                self.policy.update(part, composition.objective(actuation, age), metrics)

    def _evaluate(self) -> None:
        """Accuracy on the held-out prompts, drawn with the same random numbers every time."""
        if not self.heldout:
            return
        rollout, evaluation = self.config.rollout, self.config.evaluation
        seed = derive_seed(self.config.run.seed, _EVALUATION)
        sampling = SamplingParams(rollout.temperature, rollout.max_new_tokens, evaluation.samples, seed)
        samples: list[Sample] = []
        failures: list[RLVRError] = []
        try:
            samples = self.rollouts.draw(self.heldout, sampling)
        except RLVRError as error:  # perhaps on rank 0 alone
            failures.append(error)
        self.on_rank_0(partial(raise_first, failures))

        def record() -> None:
            result = evaluate(samples, self._judge(self.heldout, samples))
            self._recorder.record_evaluation({"step": self.step, **asdict(result)})

        self.on_rank_0(record)

    def _seed(self, stream: int) -> int:
        return derive_seed(self.config.run.seed, stream, self.step)

    def on_rank_0(self, work: Callable[[], T]) -> T:
        """Do ``work`` on rank 0; its result, or the error that a user can mend, reaches every rank."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = work()
            except (RLVRError, ConfigError) as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.object_group)
        if box[1] is not None:
            raise box[1]
        return cast(T, box[0])


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started
