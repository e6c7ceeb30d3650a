from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rlvr_sandbox.execution import Ending, Limits, Program
from rlvr_sandbox.isolation import cgroups, delegation, open_executor
from rlvr_sandbox.isolation.executor import SlotExecutor
from rlvr_sandbox.isolation.hierarchies import Places, locate
from rlvr_sandbox.verdicts import SandboxError

V1 = "5:pids:/user\n4:cpu,memory:/docker/abc\n1:name=systemd:/user\n"
V1_MOUNTS = (
    "30 20 0:30 / /sys/fs/cgroup/pids rw,relatime shared:9 - cgroup cgroup rw,pids\n"
    "31 20 0:31 /docker/abc /sys/fs/cgroup/cpu,memory rw - cgroup cgroup rw,cpu,memory\n"
)
V2_MOUNT = "41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
PLACES_V1 = Places(1, "/sys/fs/cgroup/cpu,memory", "/sys/fs/cgroup/pids/user")

HOG = "const kept = []; for (;;) kept.push(Buffer.alloc(1 << 20, 1));"
# Each child stays below the limit, and so below RLIMIT_DATA; all of them together do not.
FAMILY = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        kept = bytearray(b"x") * (40 << 20)
        time.sleep(3)
        os._exit(0)
for _ in range(6): os.wait()
print("all had room")
"""
FORKS = """
import os, time
made = 0
for _ in range(48):
    try:
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
    except BlockingIOError:
        break
    made += 1
for _ in range(made): os.wait()
print(made)
"""


def places() -> Places:
    found = delegation.find()
    if isinstance(found, str):
        pytest.skip(f"this process can make no cgroups with limits: {found}")
    return found


def left(found: Places, pid: int) -> list[str]:
    """The cgroups of the service of a process."""
    names = [name for place in found.directories for name in os.listdir(place)]
    return [name for name in names if name.startswith(f"{cgroups.PREFIX}{pid}-")]


@contextlib.asynccontextmanager
async def executor(backend: str) -> AsyncIterator[SlotExecutor]:
    try:
        opened = await open_executor(backend, slots=1, unsafe=backend == "none")
    except SandboxError as error:
        pytest.skip(f"this machine has no {backend}: {error}")
    try:
        yield opened
    finally:
        await opened.close()


@pytest.mark.parametrize(
    ("memberships", "mounts", "expected"),
    [
        (V1, V1_MOUNTS, [PLACES_V1]),
        ("0::/svc.slice/a\n", V2_MOUNT, [Places(2, "/sys/fs/cgroup/svc.slice/a", "/sys/fs/cgroup/svc.slice/a")]),
        ("0::/\n", V2_MOUNT, [Places(2, "/sys/fs/cgroup", "/sys/fs/cgroup")]),
        (
            V1 + "0::/x\n",
            UNIFIED + V1_MOUNTS,
            [Places(2, "/sys/fs/cgroup/unified/x", "/sys/fs/cgroup/unified/x"), PLACES_V1],
        ),
        ("0::/../../host\n", V2_MOUNT, []),
        ("0::/b\n", "41 31 0:38 /a /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", []),
        ("0::/ab\n", "41 31 0:38 /a /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", []),
        ("0::/a\n", "41 31 0:38 / /my\\040groups rw - cgroup2 cgroup2 rw\n", [Places(2, *["/my groups/a"] * 2)]),
        ("5:pids:/\n", V1_MOUNTS, []),
        ("5:pids:/\n4:memory:/a:b\n", V1_MOUNTS, []),
        ("", "", []),
        ("0::/\n", "25 1 0:22 / /proc rw - proc proc rw\n", []),
    ],
    ids=["v1", "v2", "v2-root", "hybrid", "outside", "elsewhere", "prefix", "escaped", "half", "colon", "no", "other"],
)  # fmt: skip
def test_the_own_cgroup_is_found(memberships: str, mounts: str, expected: list[Places]) -> None:
    assert locate(memberships, mounts) == expected


def test_version_2_is_limited_by_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain directory stands for the kernel's, for machines without the controllers of version 2."""
    group = tmp_path / "slot"
    files = ["cgroup.procs", "memory.events", "memory.oom.group", "memory.max", "memory.swap.max", "pids.max"]
    mkdir = os.mkdir

    def make(path: str) -> None:
        mkdir(path)
        for name in files:
            Path(path, name).touch()

    monkeypatch.setattr(os, "mkdir", make)
    made = cgroups.Group(Places(2, str(tmp_path), str(tmp_path)), "slot")
    made.limit(1 << 20, 7)
    assert [(group / name).read_text() for name in files[2:]] == ["1", "1048576", "0", "7"]
    kills = cgroups.Kills([os.open(group / "memory.events", os.O_RDONLY)])
    (group / "memory.events").write_text("low 0\nmax 9\noom 2\noom_kill 0\noom_group_kill 0\n")
    assert not kills.happened()
    (group / "memory.events").write_text("low 0\nmax 9\noom 2\noom_kill 1\noom_group_kill 1\n")
    assert kills.happened()
    kills.close()
    for name in files:
        (group / name).unlink()
    assert made.release()
    assert not group.exists()


def test_limits_rise_and_fall() -> None:
    group = cgroups.Group(places(), f"{cgroups.PREFIX}{os.getpid()}-limits-0")
    try:
        for size in (64 << 20, 256 << 20, 32 << 20):
            group.limit(size, 8)
    finally:
        assert group.release()


@pytest.mark.parametrize("backend", ["ns", "landlock", "bwrap", "none"])
def test_memory_of_all_processes_is_bounded(backend: str) -> None:
    async def body() -> None:
        async with executor(backend) as opened:
            if "no cgroup" in opened.report:
                pytest.skip("this process can make no cgroups with limits")
            started = time.monotonic()
            limits = Limits(memory_bytes=64 << 20, processes=16)
            outcome = await opened.run(Program("python", FAMILY), limits)
            assert (outcome.ending, outcome.stdout) == (Ending.MEMORY_LIMIT, b""), outcome
            if shutil.which("node"):
                outcome = await opened.run(Program("javascript", HOG), Limits(memory_bytes=96 << 20))
                assert outcome.ending is Ending.MEMORY_LIMIT, outcome
            assert time.monotonic() - started < 10
            assert (await opened.run(Program("python", "print(1)"), limits)).stdout == b"1\n"

    asyncio.run(body())


def test_the_kernel_itself_ends_a_hog(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cgroup alone holds: its limit is far below the one that the zygote looks after."""

    async def body() -> None:
        async with executor("ns") as opened:
            if "no cgroup" in opened.report:
                pytest.skip("this process can make no cgroups with limits")
            monkeypatch.setattr(cgroups, "ALLOWANCE_BYTES", -(448 << 20))
            source = "kept = bytearray(b'x') * (128 << 20)\nprint('had room')"
            outcome = await opened.run(Program("python", source), Limits(memory_bytes=512 << 20))
            assert (outcome.ending, outcome.stdout) == (Ending.MEMORY_LIMIT, b""), outcome
            assert opened.restarts == 0

    asyncio.run(body())


def test_processes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cgroup alone holds: it is told of fewer processes than the other limits are."""
    found = places()
    limit = cgroups.Group.limit
    monkeypatch.setattr(cgroups.Group, "limit", lambda self, memory, _: limit(self, memory, 12))

    async def body() -> None:
        async with executor("ns") as opened:
            assert str(found) in opened.report
            outcome = await opened.run(Program("python", FORKS), Limits(processes=64, wall_s=20.0))
            assert (outcome.ending, outcome.stdout) == (Ending.EXITED, b"11\n"), outcome

    asyncio.run(body())


def test_nothing_is_left_after_runs_and_after_close() -> None:
    found = places()

    async def body() -> None:
        async with executor("ns") as opened:
            assert left(found, os.getpid())
            source = "import os, time\nfor _ in range(4):\n    if os.fork() == 0: os.setsid(); time.sleep(5)"
            assert (await opened.run(Program("python", source), Limits(processes=8))).ending is Ending.EXITED
            for place in found.directories:
                for name in left(found, os.getpid()):
                    assert Path(place, name, "cgroup.procs").read_text() == ""

    asyncio.run(body())
    assert left(found, os.getpid()) == []


def test_all_works_without() -> None:
    async def body() -> None:
        async with executor("ns") as opened:
            assert opened.report.endswith("no cgroup (none here)")
            assert (await opened.run(Program("python", "print(1)"), Limits())).stdout == b"1\n"
            outcome = await opened.run(Program("python", FAMILY), Limits(memory_bytes=64 << 20, processes=16))
            assert outcome.ending is Ending.MEMORY_LIMIT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delegation, "find", lambda: "none here")
        asyncio.run(body())


def test_runs_that_cannot_join_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that ask for the joiner's own rights refuse every run; an unwritable descriptor does the same."""
    found = places()
    null = os.open("/dev/null", os.O_RDONLY)
    monkeypatch.setattr(cgroups.Group, "admit", lambda *_: [null, null])

    async def body() -> None:
        async with executor("ns") as opened:
            assert f"no cgroup ({found}: " in opened.report
            assert (await opened.run(Program("python", "print(1)"), Limits())).stdout == b"1\n"

    try:
        asyncio.run(body())
    finally:
        os.close(null)
    assert left(found, os.getpid()) == []
