"""The run's inference: an embedded engine on every rank, or one SGLang fleet that rank 0 speaks to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_rlvr.config import Config
from megatron_rlvr.core import Prompt, RLVRError, Sample, SamplingParams
from megatron_rlvr.policy import parallel
from megatron_rlvr.rollout import EmbeddedEngine, NamedTensors, generate_share

if TYPE_CHECKING:  # the embedded engine needs none of SGLang's side
    from megatron_rlvr.rollout.sglang.fleet import SGLangFleet

T = TypeVar("T")


class EmbeddedRollouts:
    """An engine of its own on every rank, each with a share of the prompts; every method is collective."""

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        group: dist.ProcessGroup,
        agree: Callable[[Callable[[], Any]], Any],
    ) -> None:
        """Build this rank's engine.

        Args:
            config: The run's configuration.
            tokenizer: The model's tokenizer.
            group: All ranks, for Python objects.
            agree: Does work on rank 0; its result or its error reaches every rank.
        """
        self._engine = EmbeddedEngine(config.policy.model, tokenizer, parallel.device())
        self._prompts_per_call, self._group, self.agree = config.rollout.prompts_per_call, group, agree

    def start(self, work: Callable[[], T]) -> Future[T | None]:
        """Do ``work`` at once."""
        done: Future[T | None] = Future()
        done.set_result(work())
        return done

    def draw(self, prompts: Sequence[Prompt], sampling: SamplingParams, wanted: int | None = None) -> list[Sample]:
        """All samples on rank 0, in prompt order, whatever is ``wanted``; an empty list elsewhere."""
        rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        calls = generate_share(
            self._engine,
            [prompt.text for prompt in prompts],
            sampling,
            prompts_per_call=self._prompts_per_call,
            rank=rank,
            ranks=ranks,
        )
        share: list[Sample] | RLVRError
        try:
            share = [sample for call in calls for sample in call]
        except RLVRError as error:  # as an answer, so that no rank waits for one that never comes
            share = error
        parts: list[Any] = [None] * ranks
        dist.gather_object(share, parts if rank == 0 else None, group=self._group)
        self.agree(partial(raise_first, parts))
        # sorted() is stable: samples of one prompt, which one rank drew, keep their order
        return sorted((sample for part in parts for sample in part or []), key=lambda sample: sample.group)

    def resync(self, tensors: NamedTensors, version: int) -> None:
        """New weights for every rank's engine; the iterator's collectives are the only ones."""
        self._engine.resync(tensors, version)


class FleetRollouts:
    """A fleet of servers that rank 0 alone speaks to; the other ranks take part in the gather of the weights."""

    def __init__(self, fleet: SGLangFleet | None, on_rank_0: Callable[[Callable[[], Any]], Any]) -> None:
        """Use ``fleet`` on rank 0; None on the others."""
        self._fleet, self._on_rank_0 = fleet, on_rank_0
        self._background = ThreadPoolExecutor(1, thread_name_prefix="collect")

    def start(self, work: Callable[[], T]) -> Future[T | None]:
        """Do ``work`` on rank 0 in the background, after what was started before; elsewhere nothing."""
        if self._fleet is not None:
            return self._background.submit(work)
        done: Future[T | None] = Future()
        done.set_result(None)
        return done

    def agree(self, work: Callable[[], T]) -> T:
        """Do ``work``: rank 0 draws and judges alone."""
        return work()

    def draw(self, prompts: Sequence[Prompt], sampling: SamplingParams, wanted: int | None = None) -> list[Sample]:
        """All samples on rank 0, or those of the first ``wanted`` prompts that are done; an empty list elsewhere."""
        if self._fleet is None:
            return []
        return self._fleet.generate([prompt.text for prompt in prompts], sampling, wanted)

    def close(self) -> None:
        """Start nothing more; what runs ends with the fleet."""
        self._background.shutdown(wait=False, cancel_futures=True)

    def resync(self, tensors: NamedTensors, version: int) -> None:
        """New weights for the fleet; what fails on rank 0 is raised on every rank, once all have read ``tensors``."""
        tensors = iter(tensors)
        failures: list[RLVRError] = []
        if self._fleet is not None:
            try:
                self._fleet.resync(tensors, version)
            except RLVRError as error:
                failures.append(error)
        for _ in tensors:
            pass
        self._on_rank_0(partial(raise_first, failures))


def raise_first(answers: Sequence[Any]) -> None:
    """Raise the first of ``answers`` that is an RLVRError."""
    for answer in answers:
        if isinstance(answer, RLVRError):
            raise answer


Rollouts = EmbeddedRollouts | FleetRollouts


@contextmanager
def open_fleet(config: Config, tokenizer: PreTrainedTokenizerBase) -> Iterator[SGLangFleet]:
    """The fleet of a run with ``rollout.engine=sglang``: launched servers, or attached ones (``rollout.urls``).

    Raises:
        RLVRError: If SGLang is not there, a flag is unknown, or a server does not start or answer.
    """
    from megatron_rlvr.rollout.resync import BroadcastTransport, DiskTransport, Resync, TensorTransport, Transport
    from megatron_rlvr.rollout.sglang.launch import FleetSettings, sglang_fleet
    from megatron_rlvr.training.run_directory import RunDirectory

    rollout, directory = config.rollout, RunDirectory(config.run.dir).path
    transports: dict[str, Callable[[], Transport]] = {
        "tensor": TensorTransport,
        "disk": lambda: DiskTransport(directory / "resync"),
        "distributed": lambda: BroadcastTransport(rollout.trainer_address),
    }
    sync = Resync(
        config.policy.model,
        transports[rollout.transport](),
        bucket_bytes=rollout.bucket_mib * 2**20,
        pause="retract" if rollout.partial else "abort",
    )
    settings = FleetSettings(
        log_directory=directory / "logs",
        urls=tuple(url.strip() for url in rollout.urls.split(",") if url.strip()),
        servers=rollout.servers,
        router=rollout.router,
        flags=rollout.sglang,
        minimum=rollout.min_servers,
    )
    with sglang_fleet(config.policy.model, tokenizer, sync, settings) as fleet:
        try:
            yield fleet
        finally:
            sync.close()
