"""A fleet for the length of a ``with`` block: servers of our own, or those of others by URL."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_rlvr.rollout.engine import NamedTensors
from megatron_rlvr.rollout.sglang.client import SGLangClient
from megatron_rlvr.rollout.sglang.engines import FleetEngine
from megatron_rlvr.rollout.sglang.flags import Flag, find_python, read_installation
from megatron_rlvr.rollout.sglang.fleet import SGLangFleet
from megatron_rlvr.rollout.sglang.router import RouterClient, sglang_router
from megatron_rlvr.rollout.sglang.server import START_TIMEOUT_S, Launched, sglang_server


@dataclass(frozen=True)
class FleetSettings:
    """What a fleet consists of.

    Attributes:
        log_directory: Where the logs of what we launch go.
        urls: Running servers to attach to; with any, none is launched.
        servers: How many to launch otherwise.
        router: Whether to put a router in front.
        python: Interpreter of the environment that has SGLang; empty to look for it (`find_python`).
        flags: ``rollout.sglang.*``, passed to the servers that we launch.
        minimum: Fewest serving engines that the run goes on with.
        requests_per_engine: Most requests that one server works on at a time.
        start_timeout_s: How long the servers may take to start, seconds.
        control_timeout_s: Longest wait for the reply to anything but a generation, seconds.
        generate_timeout_s: Longest wait for the reply to a generation, seconds.
    """

    log_directory: Path
    urls: tuple[str, ...] = ()
    servers: int = 1
    router: bool = False
    python: str = ""
    flags: Mapping[str, Flag] = field(default_factory=dict)
    minimum: int = 1
    requests_per_engine: int = 32
    start_timeout_s: float = START_TIMEOUT_S
    control_timeout_s: float = 60.0
    generate_timeout_s: float = 600.0


@contextmanager
def sglang_fleet(
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    sync: Callable[[SGLangFleet, NamedTensors, int], None],
    settings: FleetSettings,
) -> Iterator[SGLangFleet]:
    """Launch or attach, and yield the fleet once every server is up; what was launched ends with the block.

    So does a call of `SGLangFleet.generate` that another thread made.

    Args:
        directory: Model directory; launched servers load it.
        tokenizer: The model's tokenizer.
        sync: See `SGLangFleet`.
        settings: What the fleet consists of.

    Raises:
        RLVRError: If SGLang is not there, a flag is unknown, or a server does not start or is too old.
    """
    deadline = time.monotonic() + settings.start_timeout_s
    with ExitStack() as stack:
        engines = _attached(settings) if settings.urls else _launched(directory, settings, stack)
        for engine in engines:
            stack.callback(engine.client.close)
        front = _router(settings, stack) if settings.router else None
        for engine in engines:
            if engine.process is None:
                engine.client.health_generate()
            else:
                engine.process.wait_ready(engine.client, deadline)
        router = None
        if front is not None:
            router = RouterClient(front.url, generate_timeout_s=settings.generate_timeout_s)
            stack.callback(router.close)
            front.wait_ready(router, deadline)
        fleet = SGLangFleet(
            directory,
            tokenizer,
            engines,
            sync,
            router=router,
            minimum=settings.minimum,
            requests_per_engine=settings.requests_per_engine,
        )
        stack.callback(fleet.close)
        yield fleet


def _client(url: str, settings: FleetSettings) -> SGLangClient:
    return SGLangClient(url, timeout_s=settings.control_timeout_s, generate_timeout_s=settings.generate_timeout_s)


def _attached(settings: FleetSettings) -> list[FleetEngine]:
    return [FleetEngine(_client(url, settings)) for url in settings.urls]


def _launched(directory: str | Path, settings: FleetSettings, stack: ExitStack) -> list[FleetEngine]:
    """Start all servers, so that they import side by side."""
    installation = read_installation(find_python(settings.python or None))
    engines = []
    for number in range(settings.servers):
        server = sglang_server(installation, directory, settings.flags, settings.log_directory / f"sglang_{number}.log")
        stack.callback(server.close)
        server.start()
        engines.append(FleetEngine(_client(server.url, settings), server))
    return engines


def _router(settings: FleetSettings, stack: ExitStack) -> Launched:
    front = sglang_router(find_python(settings.python or None), settings.log_directory / "router.log")
    stack.callback(front.close)
    front.start()
    return front
