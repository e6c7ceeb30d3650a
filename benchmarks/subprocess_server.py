"""The way SandboxFusion runs programs, as its sources document it, behind the same web framework as ours.

    python benchmarks/subprocess_server.py PORT

For every ``POST /run_code``: a temporary directory, the program in a file there, ``bash -c 'python FILE'`` in a session
of its own as the service's user and with its environment, a limit on wall time, pipes drained, the group killed. There
is no isolation (SandboxFusion's default) and no other limit. SandboxFusion's own server is not in a package registry,
so this stands in for it; it does less work than the original.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

# The original's default in its configuration file.
MAX_CONCURRENCY = 34

app = FastAPI()
turns = asyncio.Semaphore(MAX_CONCURRENCY)


class RunCodeRequest(BaseModel):
    """The fields that are used."""

    code: str
    language: str
    stdin: str | None = None
    run_timeout: float = 10.0


@app.post("/run_code")
async def run_code(body: RunCodeRequest) -> dict[str, Any]:
    """Run a program once."""
    async with turns:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "main.py")
            with open(path, "w") as file:
                file.write(body.code)
            return await _run(f"{sys.executable} {path}", folder, (body.stdin or "").encode(), body.run_timeout)


async def _run(command: str, folder: str, stdin: bytes, timeout_s: float) -> dict[str, Any]:
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", command, stdin=PIPE, stdout=PIPE, stderr=PIPE, cwd=folder, start_new_session=True
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate(stdin)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        return {"status": "Failed", "run_result": {"status": "TimeLimitExceeded", "stdout": "", "stderr": ""}}
    result = {
        "status": "Finished",
        "execution_time": time.monotonic() - started,
        "return_code": process.returncode,
        "stdout": stdout.decode(),
        "stderr": stderr.decode(),
    }
    return {"status": "Success" if process.returncode == 0 else "Failed", "message": "", "run_result": result}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
