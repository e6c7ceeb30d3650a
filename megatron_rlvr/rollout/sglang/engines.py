"""One server of a fleet: how it is reached, and whether it takes part."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass

from megatron_rlvr.rollout.sglang.client import SGLangClient
from megatron_rlvr.rollout.sglang.server import Launched

# A process that dies is known to be dead a little later than its connections.
_DEATH_S = 0.5
_POLL_S = 0.05


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

    def last_words(self) -> str:
        """How the log of a server of ours ends, to follow the reason why it is out; empty if it has not died."""
        deadline = time.monotonic() + _DEATH_S
        while self.process is not None:
            if not self.process.alive:
                return f"; {self.process.log_tail()}"
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        return ""
