"""Launching: flags, ports, logs in errors, and that nothing outlives the trainer; a small program is launched."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_rlvr.core import RLVRError
from megatron_rlvr.rollout.sglang.client import SGLangClient
from megatron_rlvr.rollout.sglang.flags import Installation, find_python
from megatron_rlvr.rollout.sglang.server import CPU_FLAGS, Launched, sglang_server

PATCHES = Path(__file__).parents[2] / "patches" / "sglang_cpu"
NAMES = {name: (f"--{name.replace('_', '-')}", isinstance(value, bool)) for name, value in CPU_FLAGS.items()} | {
    "tp_size": ("--tp-size", False),
    "skip_server_warmup": ("--skip-server-warmup", True),
    "enable_metrics": ("--enable-metrics", True),
    "cuda_graph_bs": ("--cuda-graph-bs", False),
}
# Serves 200 for everything, and has a child as SGLang has.
PROGRAM = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
host, port = sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1])
print("child", child.pid, flush=True)
http.server.HTTPServer((host, port), Handler).serve_forever()
"""


@pytest.fixture
def installation() -> Installation:
    return Installation(Path(sys.executable), "0.5.23", cuda=False, names=NAMES)


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    server = Launched(Path(sys.executable), ["-c", PROGRAM], {}, tmp_path / "logs" / "server.log")
    yield server
    server.close()


def ready(server: Launched) -> list[psutil.Process]:
    """The processes of a started server, once it serves."""
    client = SGLangClient(server.url)
    server.wait_ready(client, time.monotonic() + 30.0)
    client.close()
    assert server._process is not None
    return psutil.Process(server._process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    assert len(processes) == 2
    _, alive = psutil.wait_procs(processes, timeout=10.0)
    assert not alive


def test_stop_ends_every_process_and_a_restart_has_the_same_url(launched: Launched) -> None:
    launched.start()
    first = ready(launched)
    launched.stop()
    assert not launched.alive
    assert_gone(first)
    launched.start()
    second = ready(launched)
    os.kill(second[0].pid, signal.SIGKILL)  # a server that dies by itself takes the rest along
    assert_gone(second)


def test_the_port_stays_reserved(launched: Launched) -> None:
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", launched.port))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_server_outlives_a_trainer_however_it_ends(tmp_path: Path, number: signal.Signals) -> None:
    trainer_program = (
        "import sys, threading, time\nfrom pathlib import Path\n"
        "from megatron_rlvr.rollout.sglang.server import Launched\n"
        "server = Launched(Path(sys.executable), ['-c', sys.argv[1]], {}, Path(sys.argv[2]))\n"
        # Started from a thread that ends: the parent of a server is the trainer, not that thread.
        "thread = threading.Thread(target=server.start)\nthread.start()\nthread.join()\n"
        "print(server.port, flush=True)\ntime.sleep(600)\n"
    )
    log = tmp_path / "server.log"
    trainer = subprocess.Popen(
        [sys.executable, "-c", trainer_program, PROGRAM, str(log)], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    client = SGLangClient(f"http://127.0.0.1:{int(trainer.stdout.readline())}")
    deadline = time.monotonic() + 30.0
    while "child" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    client.health()
    (supervisor,) = psutil.Process(trainer.pid).children()
    processes = supervisor.children(recursive=True)
    trainer.send_signal(number)
    trainer.communicate()
    assert_gone(processes)
    client.close()


def test_a_server_killed_with_its_supervisor_ends_too(launched: Launched) -> None:
    launched.start()
    server, child = ready(launched)
    assert launched._process is not None
    launched._process.kill()
    assert not psutil.wait_procs([server], timeout=10.0)[1]
    child.kill()  # asks for no signal at its parent's death; SGLang's do


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    client = SGLangClient("http://127.0.0.1:1", timeout_s=1.0)
    broken = Launched(Path(sys.executable), ["-c", "import sys; sys.exit('no such model')"], {}, tmp_path / "a.log")
    broken.start()
    with pytest.raises(RLVRError, match=r"ended \(1\) instead of serving; its log .*a\.log ends with: no such model$"):
        broken.wait_ready(client, time.monotonic() + 30.0)
    broken.close()
    mute = Launched(Path(sys.executable), ["-c", "import time; time.sleep(600)"], {}, tmp_path / "b.log")
    mute.start()
    with pytest.raises(RLVRError, match="before the deadline of its start"):
        mute.wait_ready(client, time.monotonic() + 0.2)
    assert not mute.alive
    mute.close()


FAILING = """
import sys
print("ValueError: said by an earlier exception", "x" * 90000, sep=chr(10), flush=True)
if len(sys.argv) > 5:
    print(chr(27) + "[31mTraceback (most recent call last):" + chr(27) + "[0m")
    print("  File 'model.py', line 1")
    print("torch.OutOfMemoryError: no room for " + "y" * 900)
    print(*(f"clean-up {number}" for number in range(9)), sep=chr(10) * 2)
sys.exit(3)
"""


def test_the_end_of_a_log_is_short_and_names_the_last_exception(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    server = Launched(Path(sys.executable), ["-c", FAILING, "raise"], {}, log)
    try:
        client = SGLangClient(server.url, timeout_s=1.0)
        server.start()
        with pytest.raises(RLVRError, match=r"ended \(3\)"):
            server.wait_ready(client, time.monotonic() + 30.0)
        told = f"its log {log} ends with: torch.OutOfMemoryError: no room for "
        lines = " | ".join(f"clean-up {number}" for number in range(4, 9))
        assert server.log_tail() == f"{told}{'y' * (300 - 36)} | {lines}"
        server._command = [sys.executable, "-c", "print()"]
        server.start()
        with pytest.raises(RLVRError, match=r"ends with: nothing$"):
            server.wait_ready(client, time.monotonic() + 30.0)
    finally:
        server.close()


def test_flags_pass_through_and_win(installation: Installation, tmp_path: Path) -> None:
    flags = {"tp_size": 2, "dtype": "bfloat16", "enable-metrics": True, "sleep_on_idle": False, "cuda_graph_bs": [1, 2]}
    server = sglang_server(installation, "model", flags, tmp_path / "log")
    server.close()
    line = " ".join(server._command)
    assert "-m sglang.launch_server --model-path model --skip-server-warmup --device cpu" in line
    assert "--dtype bfloat16" in line
    assert "--enable-metrics --cuda-graph-bs 1 2 --host 127.0.0.1" in line
    assert "--sleep-on-idle" not in line
    assert server._environment["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1
    assert server._environment["OMP_NUM_THREADS"] == "1"
    on_gpu = sglang_server(replace(installation, cuda=True), "model", {"tp_size": 2}, tmp_path / "log")
    on_gpu.close()
    assert "--tp-size 2" in " ".join(on_gpu._command)
    assert "cpu" not in " ".join(on_gpu._command[1:])
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in on_gpu._environment


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"tp_sise": 2},
            r"rollout\.sglang\.tp_sise=2 is no argument of SGLang 0\.5\.23's server \(the nearest is tp_size",
        ),
        ({"port": 1}, r"rollout\.sglang\.port is set by the launcher; remove it"),
        ({"enable_metrics": 1}, r"enable_metrics=1 does not suit SGLang's --enable-metrics; give true or false"),
        ({"dtype": True}, r"dtype=True does not suit SGLang's --dtype; give a value that is neither"),
    ],
)
def test_flags_that_the_server_does_not_have(
    installation: Installation, flags: dict[str, int | bool], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(RLVRError, match=sentence):
        sglang_server(installation, "model", flags, tmp_path / "log")


def test_the_interpreter_is_found_or_missed_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SGLANG_PYTHON", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(RLVRError, match="run 'make sglang', or set SGLANG_PYTHON"):
        find_python()
    beside = tmp_path / "sglang" / "bin" / "python"
    beside.parent.mkdir(parents=True)
    beside.symlink_to(sys.executable)
    assert find_python() == beside
    monkeypatch.setenv("SGLANG_PYTHON", sys.executable)
    assert find_python() == Path(sys.executable)
    with pytest.raises(RLVRError, match="/nowhere/python is not a Python interpreter"):
        find_python("/nowhere/python")


@pytest.mark.parametrize(
    ("version", "outcome"),
    [
        ("0.5.17", "fine: waits for no CUDA\n"),
        ("0.5.20", "fine: waits for no CUDA\n"),
        ("0.5.23", "fine: waits for CUDA\n"),
        ("0.5.99", "patches/sglang_cpu is tested with sglang 0.5.17, 0.5.20, 0.5.23, and sglang is 0.5.99 here"),
    ],
)
def test_the_stubs_serve_tested_versions_only(tmp_path: Path, version: str, outcome: str) -> None:
    metadata = tmp_path / f"sglang-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    program = (
        "from types import SimpleNamespace\n"
        "sys.modules['torch'] = torch = SimpleNamespace()\n"
        "torch.cuda = SimpleNamespace(is_available=lambda: False, synchronize=sys.exit)\n"
        "import sglang_cpu_stubs, triton, json\n"
        "import triton.language as tl\n"
        "from torchvision.transforms import InterpolationMode\n"
        "@triton.autotune(configs=[triton.Config({}, num_warps=4)], key=['n'])\n"
        "@triton.jit\n"
        "def kernel(x, n: tl.constexpr): ...\n"
        "import sgl_kernel\n"
        "for launch in (lambda: kernel[(1,)](1, 2), lambda: sgl_kernel.rmsnorm(1, 2)):\n"
        "    try: launch()\n"
        "    except (TypeError, NotImplementedError): continue\n"
        "    raise SystemExit('a kernel ran')\n"
        "print('fine: waits for', 'CUDA' if torch.cuda.synchronize is sys.exit else 'no CUDA')\n"
    )
    done = subprocess.run(
        [sys.executable, "-ISc", f"import sys; sys.path[:0] = [{str(PATCHES)!r}, {str(tmp_path)!r}]\n{program}"],
        capture_output=True,
        text=True,
    )
    assert outcome in done.stdout + done.stderr
