"""One local SGLang server: launched, waited for, ended with this process at the latest."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rlvr.core import RLVRError
from megatron_rlvr.rollout.sglang import supervisor
from megatron_rlvr.rollout.sglang.client import SGLangClient, SGLangError
from megatron_rlvr.rollout.sglang.flags import Flag, Installation, server_environment

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 10.0
HOST = "127.0.0.1"

# What is read of a log's end and told of it; the exception that ended a server may stand above its last lines.
_LOG_BYTES = 65536
_LOG_LINES = 5
_LOG_LINE_CHARACTERS = 300
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)(: |$)")
_POLL_S = 0.5

# What a server needs without CUDA, and what keeps it small and calm there; given flags win. Measured in
# patches/README.md: the thread count alone is worth a factor of 60.
CPU_FLAGS: Mapping[str, Flag] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",  # auto makes float16 of a float32 checkpoint
    "mem_fraction_static": 0.3,
    "max_total_tokens": 65536,  # else the cache takes most of the memory
    "sleep_on_idle": True,  # else an idle scheduler burns a core
}
CPU_ENVIRONMENT: Mapping[str, str] = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # a compilation meets the stub of triton and ends a server of two ranks
}


class Launched:
    """A command under supervision that serves HTTP on a port of its own, restartable under the same URL."""

    def __init__(self, python: Path, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Reserve a port; nothing runs yet.

        Args:
            python: Interpreter that runs it.
            arguments: What follows the interpreter, before ``--host`` and ``--port``.
            environment: Changes to this process's environment.
            log: File that its output is appended to.
        """
        # Bound and never listening: nobody else is given the port, but a server that sets SO_REUSEADDR may take it.
        self._reservation = socket.socket()
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind((HOST, 0))
        self.port: int = self._reservation.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self.log = log
        self._command = [str(python), *arguments, "--host", HOST, "--port", str(self.port)]
        self._environment = server_environment(python, environment)
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        """Whether the command runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the command, or start it again; `wait_ready` says when it serves."""
        self.stop()
        scratch = tempfile.mkdtemp(prefix="rlvr-sglang-")
        supervised = [sys.executable, "-IS", supervisor.__file__, str(os.getpid()), scratch]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._log_start = output.tell()
            # A session of its own keeps a Ctrl-C at the terminal from the servers while the trainer needs them.
            self._process = subprocess.Popen(
                [*supervised, *self._command],
                env=self._environment | {"TMPDIR": scratch},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, client: SGLangClient, deadline: float) -> None:
        """Return once ``client`` finds it healthy.

        Args:
            client: Client of this server.
            deadline: Until when to wait, `time.monotonic` seconds.

        Raises:
            RLVRError: If it ended or the deadline passed; with the tail of the log. It does not run then.
        """
        while True:
            try:
                client.health()
                return
            except SGLangError as error:
                if not self.alive:
                    status = "was not started" if self._process is None else f"ended ({self._process.returncode})"
                    raise RLVRError(
                        f"the server at {self.url} {status} instead of serving; {self.log_tail()}"
                    ) from None
                if time.monotonic() > deadline:
                    self.stop()
                    raise RLVRError(f"{error} before the deadline of its start; {self.log_tail()}") from None
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End the command and all processes it started."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def close(self) -> None:
        """End the command and give the port back."""
        self.stop()
        self._reservation.close()

    def log_tail(self) -> str:
        """Where the log is and how it ends since the last start, the last exception included."""
        with self.log.open("rb") as output:
            size = output.seek(0, os.SEEK_END)
            output.seek(max(self._log_start, size - _LOG_BYTES))
            text = _COLOUR.sub("", output.read().decode(errors="replace"))
        lines = [line.strip()[:_LOG_LINE_CHARACTERS] for line in text.splitlines() if line.strip()]
        told = lines[-_LOG_LINES:]
        if not any(map(_RAISED.match, told)):
            told = [line for line in lines if _RAISED.match(line)][-1:] + told
        return f"its log {self.log} ends with: " + (" | ".join(told) or "nothing")


def sglang_server(installation: Installation, model: str | Path, flags: Mapping[str, Flag], log: Path) -> Launched:
    """A server of ``model`` with ``rollout.sglang.*`` flags, not started yet.

    Without CUDA it gets what it needs there; with CUDA nothing but ``flags``. SGLang's own warm-up is left out: it
    sends a sentence, and dies if the tokenizer cannot encode it.

    Raises:
        RLVRError: If a flag is unknown or unsuitable.
    """
    environment: dict[str, str] = {"HF_HUB_OFFLINE": "1"}
    chosen: dict[str, Flag] = {"skip_server_warmup": True}
    if not installation.cuda:
        chosen |= CPU_FLAGS
        environment |= CPU_ENVIRONMENT
        ranks = int(str(flags.get("tp_size", flags.get("tensor_parallel_size", 1))))
        if ranks > 1:  # SGLang wants to be told which cores, once a rank
            cores = sorted(os.sched_getaffinity(0))
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
                str(cores[rank % len(cores)]) for rank in range(ranks)
            )
    arguments = installation.arguments(chosen | dict(flags))
    return Launched(
        installation.python,
        ["-m", "sglang.launch_server", "--model-path", str(model), *arguments],
        environment,
        log,
    )
