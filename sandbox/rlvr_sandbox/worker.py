"""One worker process: reads chunks of items from stdin, judges them in order, writes one line for each to stdout.

Before the first item of a chunk it says that it has begun, so that a death before that is not blamed on the item.

It needs no timeouts of its own: the pool watches its CPU clock and kills it. It dies with the service even while it is
stuck in C code, because the kernel is asked to kill it when its parent dies. Checkers run libraries on hostile text, so
where the kernel has landlock a worker can read files and nothing else: no writing, no programs, no TCP, no signals.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from rlvr_sandbox.isolation import kernel, landlock
from rlvr_sandbox.verdicts import Judgement, Verdict

MAX_RESPONSE_CHARS = 1 << 20
MAX_ADDRESS_SPACE = 4 << 30
READY = b"ready"

_PR_SET_PDEATHSIG = 1


def _confine() -> None:
    """Tie this process to its parent's life and bound what it may take."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))


def _wall_in() -> None:
    """Leave nothing but reading files, for good, where the kernel has landlock."""
    version = landlock.version()
    if version:
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        rules = landlock.Ruleset(version)
        rules.allow("/", landlock.READ_FILE | landlock.READ_DIR)
        rules.allow(os.devnull, landlock.DEVICE)
        rules.restrict()


def _claim_stdout() -> int:
    """Keep stdout for results alone: what a library prints goes to stderr."""
    results = os.dup(1)
    os.dup2(2, 1)
    return results


def _judge(kind: str, response: str, spec: Mapping[str, Any]) -> Judgement:
    from rlvr_sandbox.checkers import CHECKERS

    if len(response) > MAX_RESPONSE_CHARS:
        detail = f"the response has {len(response)} characters, more than {MAX_RESPONSE_CHARS}"
        return Judgement(Verdict.OUTPUT_LIMIT, detail)
    return CHECKERS[kind](response, spec)


def main() -> None:
    """Serve chunks until stdin ends."""
    # An interrupt typed at a terminal reaches the whole group; ending the workers is the service's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _confine()
    _wall_in()
    results = _claim_stdout()
    _judge("math", r"\boxed{\frac{1}{2}}", {"answer": "0.5"})
    os.write(results, READY + b"\n")
    for chunk in sys.stdin.buffer:
        os.write(results, READY + b"\n")
        for kind, response, spec in json.loads(chunk):
            started = time.perf_counter()
            judgement = _judge(kind, response, spec)
            judgement = judgement._replace(detail=judgement.detail[:200], seconds=time.perf_counter() - started)
            os.write(results, json.dumps(judgement).encode() + b"\n")


if __name__ == "__main__":
    main()
