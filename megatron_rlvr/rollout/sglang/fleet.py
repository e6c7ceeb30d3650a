"""Several SGLang servers as one engine: who serves, who gets which request, and what is done when one fails."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_rlvr.core import RLVRError, Sample, SamplingParams
from megatron_rlvr.rollout.engine import NamedTensors
from megatron_rlvr.rollout.sglang.batch import FAREWELL_S, Attempt, Batch, Request, requests_for
from megatron_rlvr.rollout.sglang.client import SGLangError
from megatron_rlvr.rollout.sglang.engines import EngineState, FleetEngine
from megatron_rlvr.rollout.sglang.router import RouterClient
from megatron_rlvr.rollout.sglang.samples import (
    UnusableReplyError,
    check_versions,
    encode_prompts,
    generate_payload,
    read_samples,
)

ATTEMPTS = 5

_log = logging.getLogger(__name__)


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
        self._membership = threading.Lock()
        self._batches: set[Batch] = set()
        self._closed = False
        self._version: int | None = None
        self._resyncing = False
        self._resyncs = self._oldest = self._newest = 0
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

    def generate(self, prompts: Sequence[str], sampling: SamplingParams, wanted: int | None = None) -> list[Sample]:
        """See `Engine.generate`. A request that fails is sent again to another server, and replaced as a whole.

        It may run while resyncs come and go: nothing is sent during one, and what one ends is sent again.

        Args:
            prompts: See `Engine.generate`.
            sampling: See `Engine.generate`.
            wanted: Return all samples of only so many prompts, the first that have all of theirs, and end the others'
                requests; None for all prompts.

        Raises:
            RLVRError: Also if a request failed `ATTEMPTS` times without a resync to blame, too few servers are left, a
                resync fails meanwhile, or the fleet is closed.
        """
        if wanted is not None and not 0 < wanted <= len(prompts):
            raise ValueError(f"{wanted} of {len(prompts)} prompts are wanted")
        encoded = encode_prompts(prompts, self._tokenizer, self._vocabulary)
        # All samples of a prompt share a request, which halves the time of short ones; routers take one at a time.
        requests = requests_for(encoded, sampling.samples_per_prompt, together=self._router is None)
        batch = Batch(self._changed, requests, len(prompts) if wanted is None else wanted)
        with self._changed:
            if self._closed:
                raise RLVRError("the SGLang fleet is closed, because its run is over; open another to generate")
            if self._version is None and not self._resyncing:
                raise RLVRError("the SGLang fleet has no complete set of weights; resync it before generating")
            self._batches.add(batch)
        try:
            for _ in range(min(len(requests), self._requests_per_engine * len(self.engines))):
                # A daemon, for the interpreter must not wait at its exit for a server that hangs.
                threading.Thread(target=self._work, args=(batch, sampling), name="rollout", daemon=True).start()
            return batch.result()
        finally:
            self._dismiss(batch)

    def resync(self, tensors: NamedTensors, version: int) -> None:
        """See `Engine.resync`; one that fails ends every `generate` that runs."""
        with self._changed:
            self._version, self._newest, self._resyncing = None, version, True
            self._resyncs += 1
        try:
            self._sync(self, tensors, version)
            self.check()
        except BaseException as error:
            with self._changed:
                self._resyncing = False
                self._end_all(f"the resync to version {version} failed ({str(error) or type(error).__name__})")
            raise
        with self._changed:
            self._version = self._oldest = version
            self._resyncing = False
            self._changed.notify_all()

    def close(self) -> None:
        """End every `generate` that runs, its requests at the servers included; more than two seconds it never takes.

        Servers and clients are left as they are.
        """
        with self._changed:
            self._closed = True
            self._end_all("the SGLang fleet was closed")
            self._changed.wait_for(lambda: not self._batches, 2 * FAREWELL_S)

    # Who serves

    def serving(self) -> list[FleetEngine]:
        """The servers that take part, in order."""
        return [engine for engine in self.engines if engine.state is EngineState.SERVING]

    def deregister(self, engine: FleetEngine, why: str) -> None:
        """Send nothing more to ``engine``; `readmit` it once a full resync of it was verified.

        It is out once the router sends nothing more there; who finds it ill meanwhile calls this too, and waits.
        """
        with self._membership:
            if engine.state is EngineState.OUT:
                return
            why += engine.last_words()
            if self._router is not None:
                self._router.remove(engine.client.url)
            with self._changed:
                engine.state, engine.why = EngineState.OUT, why
                self._changed.notify_all()
        _log.warning("SGLang engine %s is out: %s", engine.client.url, why)

    def readmit(self, engine: FleetEngine) -> None:
        """Send to ``engine`` again; the caller has verified its weights."""
        with self._membership:
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

    # The requests of a batch

    def _work(self, batch: Batch, sampling: SamplingParams) -> None:
        """Answer requests of ``batch`` until it is over or has no more."""
        try:
            while (request := batch.take()) is not None:
                self._answer(batch, request, sampling)
        except RLVRError as error:
            batch.end(error)
        except BaseException as error:
            batch.end(error)
            raise

    def _answer(self, batch: Batch, request: Request, sampling: SamplingParams) -> None:
        """Deliver the samples of one request, all from one reply, unless the batch ends before."""
        failures, trouble, last = 0, "", None
        while failures < ATTEMPTS:
            attempt = self._lease(batch, request, last)
            if attempt is None:
                return
            last = attempt.engine
            try:
                batch.deliver(request, self._ask(attempt, sampling))
                return
            except (SGLangError, UnusableReplyError) as error:
                if batch.over or attempt.resyncs != self._resyncs:
                    continue  # it was ended on purpose: there will be no other attempt, or one after the resync
                if isinstance(error, SGLangError) and error.status in (400, 422):
                    raise  # the request is at fault, not the server
                failures, trouble = failures + 1, str(error)
                self._examine(attempt)
            finally:
                self._release(batch, attempt)
        raise RLVRError(f"a rollout request failed {ATTEMPTS} times ({trouble}); see the servers' logs")

    def _ask(self, attempt: Attempt, sampling: SamplingParams) -> list[Sample]:
        """The samples of one attempt, if its reply may become samples."""
        group, copies, prompt_ids = attempt.request.group, attempt.request.copies, attempt.request.prompt_ids
        payload = generate_payload(group, copies, prompt_ids, sampling, self._tokenizer.eos_token_id, attempt.rid)
        replies = (self._router or attempt.engine.client).generate(payload, wire=attempt.wire)
        samples = read_samples(replies, group, prompt_ids, len(copies), self._tokenizer)
        check_versions(samples, attempt.oldest, self._newest)
        if attempt.engine.state is EngineState.OUT and self._router is None:
            raise UnusableReplyError("its server was taken out meanwhile")
        return samples

    def _lease(self, batch: Batch, request: Request, last: FleetEngine | None) -> Attempt | None:
        """An attempt at the least busy server, another than ``last`` where there is one; None once the batch is over.

        During a resync it waits: a request that reached a paused server could not be aborted there.
        """
        with self._changed:
            while not batch.over:
                if not self._resyncing:
                    self.check()
                    free = [engine for engine in self.serving() if engine.load < self._requests_per_engine]
                    if free:
                        engine = min(free, key=lambda engine: (engine is last, engine.load))
                        engine.load += 1
                        attempt = Attempt(request, engine, self._oldest, self._resyncs)
                        batch.attempts.add(attempt)
                        return attempt
                self._changed.wait()
        return None

    def _release(self, batch: Batch, attempt: Attempt) -> None:
        with self._changed:
            attempt.engine.load -= 1
            batch.attempts.remove(attempt)
            self._changed.notify_all()

    def _examine(self, attempt: Attempt) -> None:
        """Take out what does not generate or announces other weights; behind a router any server may have failed."""
        for engine in [attempt.engine] if self._router is None else self.serving():
            why = self._ailment(engine)
            if why and attempt.resyncs == self._resyncs:  # a resync pauses healthy servers, and judges them all itself
                self.deregister(engine, why)

    def _ailment(self, engine: FleetEngine) -> str:
        try:
            engine.client.health_generate()
            announced = engine.client.model_info()["weight_version"]
        except SGLangError as error:
            return str(error)
        fit = announced in {str(self._oldest), str(self._newest)}
        return "" if fit else f"it announces weights of version {announced!r} and not {self._oldest}"

    # The end of a batch

    def _end_all(self, why: str) -> None:
        with self._changed:
            for batch in self._batches:
                batch.end(RLVRError(f"the rollout was broken off because {why}; see what ended the run and resume it"))

    def _dismiss(self, batch: Batch) -> None:
        """Have the servers end what is still on the wire, and hang up on it; nothing of it is sent again."""
        batch.end()
        # Paused servers must notice by themselves (see `SGLangClient.abort`); behind a router any may have a request.
        serving = [] if self._version is None else [engine.client for engine in self.serving()]
        batch.hang_up(lambda attempt: [attempt.engine.client] if self._router is None and serving else serving)
        with self._changed:
            self._batches.remove(batch)
            self._changed.notify_all()
