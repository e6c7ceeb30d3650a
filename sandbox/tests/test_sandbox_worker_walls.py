"""What is left to a library that a checker's worker runs on hostile text: reading files."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rlvr_sandbox.isolation import landlock

ATTEMPTS = {
    "write": "open('{folder}/new', 'w')",
    "append": "open('{folder}/there', 'a')",
    "remove": "os.unlink('{folder}/there')",
    "execute": "subprocess.run(['/bin/true'], check=True)",
    "shell": "(_ for _ in ()).throw(OSError) if os.system('true') else None",
    "connect": "socket.create_connection(('127.0.0.1', {port}), 1)",
    "signal": "os.kill(os.getppid(), 0)",
}
NEEDS = {"connect": 4, "signal": 6}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_a_worker_can_only_read(name: str, tmp_path: object) -> None:
    if landlock.version() < NEEDS.get(name, 1):
        pytest.skip(f"this kernel's landlock (version {landlock.version()}) cannot refuse to {name}")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        open(f"{tmp_path}/there", "w").close()
        attempt = ATTEMPTS[name].format(folder=tmp_path, port=server.getsockname()[1])
        program = (
            "import os, socket, subprocess, sys\n"
            "from rlvr_sandbox.worker import _wall_in\n"
            f"walls = sys.argv[1] == 'walls'\n_wall_in() if walls else None\n"
            f"open('{tmp_path}/there').read()\n"
            f"try:\n    {attempt}\nexcept OSError:\n    sys.exit(7)\n"
        )
        codes = [
            subprocess.run([sys.executable, "-c", program, walls], timeout=60, check=False).returncode
            for walls in ("walls", "none")
        ]
    assert codes == [7, 0]
