"""A service in small: an executor under the user that it is started as, and the attacks that it is sent, one a line."""

from __future__ import annotations

import asyncio
import json
import os
import sys

from rlvr_sandbox.execution import Limits, Program
from rlvr_sandbox.isolation import open_executor
from rlvr_sandbox.isolation.bait import Bait
from rlvr_sandbox.isolation.executor import SlotExecutor


async def attack(executor: SlotExecutor, bait: Bait, order: dict[str, object]) -> dict[str, object]:
    answers = []
    restarts = executor.restarts
    for source, language in ((order["source"], order["language"]), (order["then"], "python")):
        if source:
            text = bait.program(str(source)) if language == "python" else str(source)
            limits = Limits(**order["limits"])  # type: ignore[arg-type]
            outcome = await executor.run(Program(str(language), text), limits)
            answers.append(
                {
                    "ending": outcome.ending.value,
                    "stdout": outcome.stdout[-300:].decode(errors="replace"),
                    "stderr": outcome.stderr[-600:].decode(errors="replace"),
                    "detail": outcome.detail,
                    "wall_s": outcome.wall_s,
                }
            )
    return {"answers": answers, "taken": bait.taken(), "restarts": executor.restarts - restarts}


async def main(backend: str) -> None:
    os.environ["SERVICE_SECRET"] = "xyzzy"
    executor = await open_executor(backend, slots=1)
    print(json.dumps({"languages": executor.languages, "report": executor.report}), flush=True)
    loop = asyncio.get_running_loop()
    try:
        with Bait() as bait:
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                print(json.dumps(await attack(executor, bait, json.loads(line))), flush=True)
    finally:
        await executor.close()


asyncio.run(main(sys.argv[1]))
