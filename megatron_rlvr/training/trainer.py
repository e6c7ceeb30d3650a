"""The loop: every step is rollout → verify → prepare → update ×N → resync → report, on every rank alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_rlvr.config import Config, ConfigError
from megatron_rlvr.core import Prompt, RLVRError, RolloutBatch, Sample, SamplingParams, StepMetrics, Verdict
from megatron_rlvr.data import PromptSampler, open_prompts
from megatron_rlvr.entropy import Actuation, Attribution
from megatron_rlvr.objective import diagnose
from megatron_rlvr.policy import parallel
from megatron_rlvr.policy.hf_export import export_hf
from megatron_rlvr.policy.policy import Policy
from megatron_rlvr.report import RunRecorder
from megatron_rlvr.rollout import Engine, derive_seed, load_tokenizer, pad_id
from megatron_rlvr.training import checkpoint
from megatron_rlvr.training.composition import compose_run
from megatron_rlvr.training.engines import EmbeddedRollouts, FleetRollouts, Rollouts, open_fleet
from megatron_rlvr.training.phases import PreparedBatch, evaluate, minibatches, prepare, record_samples, weigh
from megatron_rlvr.training.run_directory import RunDirectory
from megatron_rlvr.verify import VerifierClient, local_service

T = TypeVar("T")

# Streams of random numbers, one per use; a step's seed is derived from (run.seed, stream, step).
_ROLLOUT, _MINIBATCHES, _EVALUATION, _TOKEN_RULE = range(4)


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
        self.object_group = dist.new_group(backend="gloo")
        self.on_rank_0(lambda: self.directory.open(config))
        tokenizer = load_tokenizer(policy.model)
        chat_template = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        prompts = open_prompts(config.data.train, chat_template=chat_template)
        self.heldout = (
            open_prompts(config.data.heldout, chat_template=chat_template)[: config.evaluation.prompts]
            if config.data.heldout
            else []
        )
        self.pad_id = pad_id(tokenizer)
        self.sampler = PromptSampler(prompts, run.seed)
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
        self.engine = self._open_engine(tokenizer)
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

    def _open_engine(self, tokenizer: PreTrainedTokenizerBase) -> Rollouts:
        if self.config.rollout.engine == "embedded":
            return EmbeddedRollouts(self.config, tokenizer, rank=self.rank, ranks=self.ranks)
        fleets: list[Engine] = []
        self.on_rank_0(
            lambda: fleets.append(
                self._resources.enter_context(open_fleet(self.config, tokenizer))
            )  # no result to send
        )
        return FleetRollouts(fleets[0] if fleets else None)

    def _resync(self, version: int) -> None:
        """Bring the engines to the policy's weights; what fails on rank 0 ends the run on every rank."""
        self._raise_on_all(self.engine.resync(self.policy.named_tensors(), version))

    def _raise_on_all(self, failure: RLVRError | None) -> None:
        """Raise rank 0's ``failure`` on every rank."""

        def report() -> None:
            if failure is not None:
                raise failure

        self.on_rank_0(report)

    def _train_step(self) -> None:
        metrics, local, seconds = StepMetrics(), StepMetrics(), dict[str, float]()
        started = time.perf_counter()
        rollout = self.config.rollout
        prompts = self.sampler.take(rollout.prompts)
        self.policy.temperature = self.control.next_temperature(rollout.temperature)
        with _timed(seconds, "rollout"):
            samples = self._rollout(prompts, rollout.samples_per_prompt, self._seed(_ROLLOUT), self.policy.temperature)
        with _timed(seconds, "verify"):
            batch = self._verify(prompts, samples, local)
        with _timed(seconds, "prepare"):
            prepared = self._prepare(batch, metrics)
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
                    "epoch": self.sampler.epoch,
                    **self._controlled(actuation),
                    "learning_rate": learning_rate,
                    **means,
                    **change,
                    **shares,
                    **local.means(),
                    "tokens_per_s": local.sums["response_tokens"] / total,
                    **{f"seconds/{phase}": value for phase, value in seconds.items()},
                    "seconds/total": total,
                }
            )
            self._note(prepared, batch, means)
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

    def _note(self, prepared: PreparedBatch, batch: RolloutBatch, means: dict[str, float]) -> None:
        """Say in words what a user should look at: a controller that can do no more, an engine that disagrees."""
        self._recorder.note(self.step, "entropy control", self.control.alarm)
        # the rounding of log-probs themselves, of which fp32 has little and bf16 much
        eps = torch.finfo(torch.float32 if self.config.policy.precision == "fp32" else torch.bfloat16).eps
        finding: str | None = None
        if means["rollout_trainer_gap_max"] > (tolerance := max(1e-3, 32 * eps)):
            mask_BL, stats = prepared.stats.mask_BL, prepared.stats
            diagnosis = diagnose(
                stats.logprob_BL[mask_BL],
                batch.rollout_logprobs_BL[mask_BL],
                stats.entropy_BL[mask_BL],
                versions={batch.weight_version},
                expected_version=self.step,
                eps=eps,
                tolerance=tolerance,
            )
            finding = f"{diagnosis.cause}: {diagnosis.sentence}"
        self._recorder.note(self.step, "engine and trainer disagree", finding)

    def _rollout(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, temperature: float
    ) -> list[Sample]:
        """All samples on rank 0, in prompt order; an empty list elsewhere."""
        budget = self.config.rollout.max_new_tokens
        sampling = SamplingParams(temperature, budget, samples_per_prompt, seed)
        share: list[Sample] | RLVRError
        try:
            share = self.engine.generate([prompt.text for prompt in prompts], sampling)
        except RLVRError as error:  # as an answer, so that no rank waits for one that never comes
            share = error
        gathered: list[Any] = [None] * self.ranks
        dist.gather_object(share, gathered if self.rank == 0 else None, group=self.object_group)
        self._raise_on_all(next((part for part in gathered if isinstance(part, RLVRError)), None))
        # sorted() is stable: samples of one prompt, which one rank drew, keep their order
        return sorted((sample for part in gathered for sample in part or []), key=lambda sample: sample.group)

    def _judge(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[Verdict]:
        return self._verifier.verify([(prompts[sample.group], sample.text) for sample in samples])

    def _verify(self, prompts: Sequence[Prompt], samples: Sequence[Sample], metrics: StepMetrics) -> RolloutBatch:
        """The verified batch, on every rank."""

        def judged() -> RolloutBatch:
            verdicts = self._judge(prompts, samples)
            record_samples(samples, verdicts, metrics)
            return RolloutBatch.from_samples(samples, self.pad_id).with_verdicts(verdicts)

        batch = self.on_rank_0(judged)
        if batch.weight_version != self.step:
            raise RLVRError(
                f"step {self.step} got samples of weight version {batch.weight_version}; an engine serves stale "
                "weights, restart the run to resync it"
            )
        return batch

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
        seed = derive_seed(self.config.run.seed, _EVALUATION)
        samples = self._rollout(self.heldout, self.config.evaluation.samples, seed, self.config.rollout.temperature)

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
