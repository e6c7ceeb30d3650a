"""The run's inference: an embedded engine on every rank, or one SGLang fleet that rank 0 speaks to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from megatron_rlvr.config import Config
from megatron_rlvr.core import RLVRError, Sample, SamplingParams
from megatron_rlvr.policy import parallel
from megatron_rlvr.rollout import EmbeddedEngine, Engine, NamedTensors, generate_share


class EmbeddedRollouts:
    """An engine of its own on every rank, each with a share of the prompts."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, *, rank: int, ranks: int) -> None:
        """Build this rank's engine."""
        self._engine = EmbeddedEngine(config.policy.model, tokenizer, parallel.device())
        self._prompts_per_call, self._rank, self._ranks = config.rollout.prompts_per_call, rank, ranks

    def generate(self, prompts: Sequence[str], sampling: SamplingParams) -> list[Sample]:
        """This rank's samples of ``prompts``; the ranks' lists together hold all of them."""
        calls = generate_share(
            self._engine,
            prompts,
            sampling,
            prompts_per_call=self._prompts_per_call,
            rank=self._rank,
            ranks=self._ranks,
        )
        return [sample for call in calls for sample in call]

    def resync(self, tensors: NamedTensors, version: int) -> RLVRError | None:
        """New weights for every rank's engine; the iterator's collectives are the only ones."""
        self._engine.resync(tensors, version)
        return None


class FleetRollouts:
    """A fleet of servers that rank 0 alone speaks to; the other ranks take part in the gather of the weights."""

    def __init__(self, fleet: Engine | None) -> None:
        """Use ``fleet`` on rank 0; None on the others."""
        self._fleet = fleet

    def generate(self, prompts: Sequence[str], sampling: SamplingParams) -> list[Sample]:
        """All samples on rank 0."""
        return self._fleet.generate(prompts, sampling) if self._fleet is not None else []

    def resync(self, tensors: NamedTensors, version: int) -> RLVRError | None:
        """New weights for the fleet; what went wrong is returned, for every rank has to read ``tensors`` to the end."""
        tensors = iter(tensors)
        failure = None
        if self._fleet is not None:
            try:
                self._fleet.resync(tensors, version)
            except RLVRError as error:
                failure = error
        for _ in tensors:
            pass
        return failure


Rollouts = EmbeddedRollouts | FleetRollouts


@contextmanager
def open_fleet(config: Config, tokenizer: PreTrainedTokenizerBase) -> Iterator[Engine]:
    """The fleet of a run with ``rollout.engine=sglang``: launched servers, or attached ones (``rollout.urls``).

    Raises:
        RLVRError: If SGLang is not there, a flag is unknown, or a server does not start or answer.
    """
    # only here: the embedded engine needs none of it
    from megatron_rlvr.rollout.resync import BroadcastTransport, DiskTransport, Resync, TensorTransport, Transport
    from megatron_rlvr.rollout.sglang.launch import FleetSettings, sglang_fleet
    from megatron_rlvr.training.run_directory import RunDirectory

    rollout, directory = config.rollout, RunDirectory(config.run.dir).path
    transports: dict[str, Callable[[], Transport]] = {
        "tensor": TensorTransport,
        "disk": lambda: DiskTransport(directory / "resync"),
        "distributed": lambda: BroadcastTransport(rollout.trainer_address),
    }
    sync = Resync(config.policy.model, transports[rollout.transport](), bucket_bytes=rollout.bucket_mib * 2**20)
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
