"""Several SGLang servers as one engine: who serves, who gets which request, and what is done when one fails."""

from __future__ import annotations

import enum
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_rlvr.core import RLVRError, Sample, SamplingParams
from megatron_rlvr.rollout.engine import NamedTensors
from megatron_rlvr.rollout.sglang.client import SGLangClient, SGLangError
from megatron_rlvr.rollout.sglang.router import RouterClient
from megatron_rlvr.rollout.sglang.samples import UnusableReplyError, generate_payload, read_samples
from megatron_rlvr.rollout.sglang.server import Launched

ATTEMPTS = 5

_log = logging.getLogger(__name__)


class EngineState(enum.StrEnum):
    """Whether a server takes part."""

    SERVING = "serving"
    OUT = "out"


@dataclass(eq=False, slots=True)
class FleetEngine:
    """One server of the fleet.

    Attributes:
        client: Talks to it.
        process: What we launched; None for a server that somebody else runs.
        state: Only servers in ``SERVING`` get requests.
        why: Why it is out, in words.
        load: Requests that it is answering.
    """

    client: SGLangClient
    process: Launched | None = None
    state: EngineState = EngineState.SERVING
    why: str = ""
    load: int = 0

    @property
    def tensor_parallel(self) -> int:
        """Over how many ranks the server shards the model."""
        return self.client.tensor_parallel


@dataclass(frozen=True, slots=True)
class _Request:
    """Samples number ``copies`` of the prompt at position ``group``."""

    group: int
    copies: range
    prompt_ids: list[int]


class SGLangFleet:
    """Implements `Engine` over SGLang servers; any thread may generate while another resyncs.

    The draws are a function of the seed only on servers that run with ``enable_deterministic_inference``.
    """

    def __init__(
        self,
        directory: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        engines: Sequence[FleetEngine],
        sync: Callable[[SGLangFleet, NamedTensors, int], None],
        *,
        router: RouterClient | None = None,
        minimum: int = 1,
        requests_per_engine: int = 32,
    ) -> None:
        """Take servers that are up; they serve nothing before the first resync.

        Args:
            directory: Model directory, read for the size of its vocabulary.
            tokenizer: The model's tokenizer; encodes prompts and decodes responses.
            engines: The servers.
            sync: Brings weights to the servers: called with this fleet, the tensors and their version, it may call
                `deregister` and `readmit`, and returns once every server that still serves has them.
            router: Gets the generation requests in place of the servers themselves.
            minimum: Fewest serving engines the run goes on with.
            requests_per_engine: Most requests, of one prompt each, that one server works on at a time.

        Raises:
            RLVRError: If there are fewer than ``minimum`` engines, or one is no SGLang server of a version we speak.
        """
        self.engines = list(engines)
        self._vocabulary = int(json.loads((Path(directory) / "config.json").read_text())["vocab_size"])
        self._tokenizer = tokenizer
        self._sync = sync
        self._router = router
        self._minimum = minimum
        self._requests_per_engine = requests_per_engine
        self._changed = threading.Condition()
        self._version: int | None = None
        self._oldest = self._newest = 0
        self.check()
        for engine in self.engines:
            _ = engine.client.sessions
            if router is not None:
                router.add(engine.client.url)

    # Engine

    @property
    def version(self) -> int | None:
        """See `Engine.version`."""
        return self._version

    def generate(self, prompts: Sequence[str], sampling: SamplingParams) -> list[Sample]:
        """See `Engine.generate`. A request that fails is sent again to another server, and replaced as a whole.

        Raises:
            RLVRError: Also if a request failed `ATTEMPTS` times, or too few servers are left.
        """
        if self._version is None:
            raise RLVRError("the SGLang fleet has no complete set of weights; resync it before generating")
        prompt_ids = [self._encode(position, len(prompts), prompt) for position, prompt in enumerate(prompts)]
        # All samples of a prompt share a request, which halves the time of short ones; routers take one at a time.
        count, size = sampling.samples_per_prompt, sampling.samples_per_prompt if self._router is None else 1
        requests = [
            _Request(group, range(start, min(start + size, count)), ids)
            for group, ids in enumerate(prompt_ids)
            for start in range(0, count, size)
        ]
        width = min(len(requests), self._requests_per_engine * len(self.engines))
        with ThreadPoolExecutor(max(width, 1), thread_name_prefix="rollout") as pool:
            answers = [pool.submit(self._answer, request, sampling) for request in requests]
            try:
                return [sample for answer in answers for sample in answer.result()]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def resync(self, tensors: NamedTensors, version: int) -> None:
        """See `Engine.resync`."""
        self._version, self._newest = None, version
        self._sync(self, tensors, version)
        self.check()
        self._version = self._oldest = version

    # Who serves

    def serving(self) -> list[FleetEngine]:
        """The servers that take part, in order."""
        return [engine for engine in self.engines if engine.state is EngineState.SERVING]

    def deregister(self, engine: FleetEngine, why: str) -> None:
        """Send nothing more to ``engine``; `readmit` it once a full resync of it was verified."""
        with self._changed:
            if engine.state is EngineState.OUT:
                return
            engine.state, engine.why = EngineState.OUT, why
            self._changed.notify_all()
        _log.warning("SGLang engine %s is out: %s", engine.client.url, why)
        if self._router is not None:
            self._router.remove(engine.client.url)

    def readmit(self, engine: FleetEngine) -> None:
        """Send to ``engine`` again; the caller has verified its weights."""
        if self._router is not None:
            self._router.add(engine.client.url)
        with self._changed:
            engine.state, engine.why = EngineState.SERVING, ""
            self._changed.notify_all()

    def check(self) -> None:
        """Raise RLVRError if fewer engines than the minimum serve."""
        serving = len(self.serving())
        if serving < self._minimum or not serving:
            reasons = "; ".join(f"{engine.client.url}: {engine.why}" for engine in self.engines if engine.why)
            raise RLVRError(
                f"{serving} of {len(self.engines)} SGLang engines serve, fewer than the {max(self._minimum, 1)} needed "
                f"({reasons or 'no more were given'}); mend or add servers and resume the run"
            )

    # One request

    def _encode(self, position: int, count: int, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(prompt, add_special_tokens=False)
        if not ids:
            raise RLVRError(f"prompt {position} of {count} has no tokens; remove it from the source")
        if max(ids) >= self._vocabulary:  # one such id ends the whole server
            raise RLVRError(
                f"prompt {position} of {count} has token {max(ids)}, but the model's vocabulary ends at "
                f"{self._vocabulary - 1}; use the model's own tokenizer"
            )
        return ids

    def _answer(self, request: _Request, sampling: SamplingParams) -> list[Sample]:
        """The samples of one request, all from one reply."""
        group, copies, prompt_ids = request.group, request.copies, request.prompt_ids
        payload = generate_payload(group, copies, prompt_ids, sampling, self._tokenizer.eos_token_id)
        trouble, last = "", None
        for _ in range(ATTEMPTS):
            with self._lease(last) as last:
                oldest = self._oldest
                try:
                    replies = (self._router or last.client).generate(payload)
                    samples = read_samples(replies, group, prompt_ids, len(copies), self._tokenizer)
                    self._check_versions(samples, oldest)
                    if last.state is EngineState.OUT and self._router is None:
                        raise UnusableReplyError("its server was taken out meanwhile")
                    return samples
                except (SGLangError, UnusableReplyError) as error:
                    if isinstance(error, SGLangError) and error.status in (400, 422):
                        raise  # the request is at fault, not the server
                    trouble = str(error)
                    self._examine(last)
        raise RLVRError(f"a rollout request failed {ATTEMPTS} times ({trouble}); see the servers' logs")

    def _check_versions(self, samples: Sequence[Sample], oldest: int) -> None:
        """Only versions between the one served when the request left and the newest may have made a token."""
        for sample in samples:
            versions = [version for version, _, _ in sample.version_spans]
            if versions != sorted(versions) or versions[0] < oldest or versions[-1] > self._newest:
                raise UnusableReplyError(f"weights of version {versions} answered, expected {oldest} to {self._newest}")

    @contextmanager
    def _lease(self, last: FleetEngine | None) -> Iterator[FleetEngine]:
        """The least busy server for the length of the block, another than ``last`` where there is one."""
        with self._changed:
            while True:
                self.check()
                free = [engine for engine in self.serving() if engine.load < self._requests_per_engine]
                if free:
                    break
                self._changed.wait()
            engine = min(free, key=lambda engine: (engine is last, engine.load))
            engine.load += 1
        try:
            yield engine
        finally:
            with self._changed:
                engine.load -= 1
                self._changed.notify()

    def _examine(self, suspect: FleetEngine) -> None:
        """Take out what does not generate or announces other weights; behind a router any server may have failed."""
        if self._version is None:
            return  # a resync is under way: it pauses healthy servers, and judges them all itself
        for engine in [suspect] if self._router is None else self.serving():
            try:
                engine.client.health_generate()
                announced = engine.client.model_info()["weight_version"]
            except SGLangError as error:
                self.deregister(engine, str(error))
                continue
            if announced not in {str(self._oldest), str(self._newest)}:
                self.deregister(engine, f"it announces weights of version {announced!r} and not {self._oldest}")
