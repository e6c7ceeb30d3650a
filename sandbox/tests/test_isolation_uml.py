"""Cgroups of version 2 with memory and pids, on a kernel of their own: user-mode Linux, where somebody has one.

    apt-get download user-mode-linux && dpkg -x user-mode-linux_*.deb uml
    LINUX_UML=uml/usr/bin/linux.uml python -m pytest sandbox/tests/test_isolation_uml.py      # some minutes, as root

Its processes see the files of this machine, read-only. Page faults take so long there that the self-test is left out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
from sandbox_server import SANDBOX

GUEST = """
import asyncio, json, os, sys
from rlvr_sandbox.execution import Limits, Program
from rlvr_sandbox.isolation import choice, open_executor
from test_isolation_cgroups import FAMILY, FORKS
async def unproved(*_): return "unproved"
choice.prove = unproved
name, backend, how = sys.argv[1:]
def own(): return open("/proc/self/cgroup").read().strip()[3:]
def groups(): return sorted(os.path.relpath(d, "/sys/fs/cgroup") for d, _, _ in os.walk("/sys/fs/cgroup"))[1:]
async def main():
    facts = {"before": own()}
    executor = await open_executor(backend, slots=1, unsafe=backend == "none")
    facts |= {"report": executor.report, "during": own(), "groups": len(groups())}
    patient = {"cpu_s": 60.0, "wall_s": 120.0}
    if how == "kill":
        source = "import os, time\\nfor _ in range(3): os.fork()\\ntime.sleep(100)"
        asyncio.create_task(executor.run(Program("python", source), Limits(processes=40, **patient)))
        await asyncio.sleep(2)
        print("\\nFACTS", json.dumps({"name": name, **facts}), flush=True)
        os.kill(os.getpid(), 9)
    outcome = await executor.run(Program("python", FAMILY), Limits(memory_bytes=64 << 20, processes=16, **patient))
    facts["family"] = outcome.ending
    if "cgroup v2" in executor.report.split("no cgroup")[0]:
        outcome = await executor.run(Program("python", FORKS), Limits(processes=12, **patient))
        facts["forks"] = outcome.stdout.decode().strip()
    await executor.close()
    print("\\nFACTS", json.dumps({"name": name, **facts, "after": own()}), flush=True)
asyncio.run(main())
"""
INIT = """#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /run
mkdir -p /dev/shm; mount -t tmpfs -o mode=1777 shm /dev/shm
G=/sys/fs/cgroup; mount -t cgroup2 none $G
export PATH=/usr/bin:/bin PYTHONPATH={path} PYTHONDONTWRITEBYTECODE=1 TMPDIR=/run HOME=/run
left() {{ sleep 2; echo; echo LEFT $1 $(find $G -mindepth 1 -type d | sort | tr '\\n' ' ') $(ls /dev/shm); }}
in_svc() {{ sh -c "echo 0 > $G/svc/cgroup.procs; exec $1"; }}
GUEST="{python} {guest}"
$GUEST root ns -; left root
mkdir $G/svc
in_svc "$GUEST own ns -"; left own
in_svc "sh -c '$GUEST shared none -; true'"
in_svc "$GUEST killed none kill"; left killed
in_svc "$GUEST killed-ns ns kill"; left killed-ns
in_svc "unshare -C -m sh -c 'umount $G; mount -t cgroup2 none $G; exec $GUEST namespace none -'"; left namespace
mkdir -p /run/systemd/system
in_svc "$GUEST unmarked none -"
{python} -c "import os; os.setxattr('$G/svc', 'trusted.delegate', b'1')"
in_svc "$GUEST marked none -"; left marked
mkdir $G/svc/sub
sh -c "echo 0 > $G/svc/sub/cgroup.procs; exec $GUEST subgroup none -"
rmdir $G/svc/sub; echo -memory -pids > $G/svc/cgroup.subtree_control; rm -r /run/systemd
chown 1000:1000 $G/svc $G/svc/cgroup.procs $G/svc/cgroup.subtree_control
USER="setpriv --reuid 1000 --regid 1000 --clear-groups /usr/bin/python3 {guest}"
in_svc "$USER user none -"; left user
chown 0:0 $G/svc/cgroup.subtree_control
in_svc "$USER unwritable none -"
{python} -c "import ctypes; ctypes.CDLL(None).reboot(0x4321FEDC)"
"""
SERVICE = "/svc/rlvr-sandbox-service"
# Where each began, where it was while it served, and the words of its report where there is no cgroup.
EXPECTED = {
    "root": ("/", "/", ""),
    "own": ("/svc", SERVICE, ""),
    "killed": ("/svc", SERVICE, ""),
    "killed-ns": ("/svc", SERVICE, ""),
    "namespace": ("/", "/rlvr-sandbox-service", ""),
    "marked": ("/svc", SERVICE, ""),
    "subgroup": ("/svc/sub", "/svc/sub", ""),
    "user": ("/svc", SERVICE, ""),
    "shared": ("/svc", "/svc", "also holds the processes"),
    "unmarked": ("/svc", "/svc", "set Delegate=yes"),
    "unwritable": ("/svc", "/svc", "Permission denied"),
}


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the machine said from its start to its end."""
    kernel = os.environ.get("LINUX_UML") or shutil.which("linux.uml")
    if kernel is None or os.geteuid() != 0:
        pytest.skip("needs root and user-mode Linux, see above")
    folder = tmp_path_factory.mktemp("uml")
    for above in (folder, *folder.parents[:3]):
        above.chmod(above.stat().st_mode | 0o055)
    (folder / "guest.py").write_text(GUEST)
    code = folder / "code"
    shutil.copytree(SANDBOX / "rlvr_sandbox", code / "rlvr_sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    (code / "test_isolation_cgroups.py").write_text(_sources())
    facts = {"path": code, "python": sys.executable, "guest": folder / "guest.py"}
    init = folder / "init.sh"
    init.write_text(INIT.format(**facts))
    init.chmod(0o755)
    command = [
        os.path.abspath(kernel),
        "mem=1500M",
        "root=/dev/root",
        "rootfstype=hostfs",
        "rootflags=/",
        "ro",
        "quiet",
    ]
    command += [f"init={init}", "con=null", "con0=fd:0,fd:1", f"umid=rlvr{os.getpid()}", f"uml_dir={folder}/"]
    said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=400)
    return said.stdout.decode(errors="replace").splitlines()


def _sources() -> str:
    """The two programs, where no test framework is."""
    from test_isolation_cgroups import FAMILY, FORKS

    return f"FAMILY = {FAMILY!r}\nFORKS = {FORKS!r}\n"


@pytest.mark.parametrize("name", EXPECTED)
def test_cgroups_of_version_2(console: list[str], name: str) -> None:
    found: list[dict[str, Any]] = [json.loads(line[6:]) for line in console if line.startswith("FACTS ")]
    facts = next((facts for facts in found if facts["name"] == name), {})
    assert facts, "\n".join(console)
    before, during, words = EXPECTED[name]
    assert (facts["before"], facts["during"]) == (before, during)
    if words:
        assert "no cgroup (cgroup v2: " in facts["report"]
        assert words in facts["report"]
    else:
        assert facts["report"].endswith(", cgroup v2")
    if "killed" not in name:
        assert facts["after"] == before
        assert facts["family"] == "memory_limit"
        assert words or facts["forks"] in ("10", "11")


@pytest.mark.parametrize("name", ["root", "own", "killed", "killed-ns", "namespace", "marked", "user"])
def test_nothing_is_left_on_version_2(console: list[str], name: str) -> None:
    left = next(line.split() for line in console if line.startswith(f"LEFT {name} ") or line == f"LEFT {name}")
    assert left[2:] == ([] if name == "root" else ["/sys/fs/cgroup/svc"])
