"""Arranging the cgroup of version 2 that was given to the service, on the real file system where root may mount it.

A machine whose memory and pids controllers serve version 1 has others for version 2; the kernel's rules are the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rlvr_sandbox.isolation import cgroups, delegation
from rlvr_sandbox.isolation.delegation import LEAF
from rlvr_sandbox.isolation.hierarchies import Places

PREAMBLE = """
import json, os, sys, time
from rlvr_sandbox.isolation import cgroups, delegation
from rlvr_sandbox.isolation.hierarchies import Places, locate
place, controller, root = sys.argv[1:]
delegation.CONTROLLERS = (controller,)
delegation.SYSTEMD = "/no/systemd"
with open(f"{place}/cgroup.procs", "w") as file: file.write("0")
def own():
    line = [l for l in open("/proc/self/cgroup") if l.startswith("0::")][0]
    return root + line[3:].rstrip()
def given():
    try:
        return delegation._given(Places(2, own(), own())).memory
    except OSError as error:
        return str(error)
def holds(path):
    return [int(pid) for pid in open(f"{path}/cgroup.procs").read().split()]
"""
FAMILY = """
child = os.fork()
if child == 0: time.sleep(20); os._exit(0)
try:
    found = [given(), given()]
    leaf = f"{place}/rlvr-sandbox-service"
    facts = {"given": found, "inside": holds(place), "all": sorted(holds(leaf)) == sorted([os.getpid(), child])}
    facts["handed_on"] = open(f"{place}/cgroup.subtree_control").read().split()
    os.mkdir(f"{place}/run")
    facts["limits"] = any(name.startswith(f"{controller}.") for name in os.listdir(f"{place}/run"))
    facts["own"] = own() == leaf
    delegation.leave(Places(2, place, place))
    facts["stays"] = os.path.isdir(leaf)
    os.rmdir(f"{place}/run")
finally:
    os.kill(child, 9); os.wait()
delegation.leave(Places(2, place, place))
facts["left"] = [own() == place, os.path.isdir(leaf), open(f"{place}/cgroup.subtree_control").read().split()]
print(json.dumps(facts))
"""
ONCE = "print(json.dumps({'given': given(), 'own': own(), 'leaf': os.path.isdir(f'{place}/rlvr-sandbox-service')}))"


@pytest.fixture(scope="module")
def hierarchy() -> Iterator[tuple[Path, str]]:
    """Where version 2 is mounted, and a controller that cgroups below its root can be given."""
    with tempfile.TemporaryDirectory(prefix="rlvr-cgroup2-") as folder:
        mounted = subprocess.run(["mount", "-t", "cgroup2", "none", folder], capture_output=True, check=False)
        if mounted.returncode != 0:
            pytest.skip("cgroup2 cannot be mounted here")
        try:
            root = Path(folder)
            controllers = {*(root / "cgroup.controllers").read_text().split()} - {"cpu", "pids", "perf_event", "cpuset"}
            if not controllers:
                pytest.skip("no controller that binds whole processes serves version 2 here")
            yield root, min(controllers)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def place(hierarchy: tuple[Path, str]) -> Iterator[Path]:
    """A fresh cgroup with the controller, as a service manager hands it over."""
    root, controller = hierarchy
    control = root / "cgroup.subtree_control"
    fresh = controller not in control.read_text().split()
    if fresh:
        control.write_text(f"+{controller}")
    made = root / f"rlvr-test-{os.getpid()}"
    made.mkdir()
    try:
        yield made
    finally:
        for folder in sorted((*made.rglob("*/"), made), key=lambda folder: -len(folder.parts)):
            if folder.is_dir():
                (folder / "cgroup.kill").write_text("1")
                folder.rmdir()
        if fresh:
            control.write_text(f"-{controller}")


def service(hierarchy: tuple[Path, str], place: Path, source: str) -> Any:
    """What a program says that begins its life in ``place``."""
    command = [sys.executable, "-c", PREAMBLE + source, str(place), hierarchy[1], str(hierarchy[0])]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True, timeout=20).stdout)


def test_the_service_moves_into_a_leaf_and_back(hierarchy: tuple[Path, str], place: Path) -> None:
    facts = service(hierarchy, place, FAMILY)
    assert facts == {
        "given": [str(place)] * 2, "inside": [], "all": True, "handed_on": [hierarchy[1]], "limits": True,
        "own": True, "stays": True, "left": [True, False, []],
    }  # fmt: skip


def test_a_cgroup_with_others_in_it_is_left_as_it_is(hierarchy: tuple[Path, str], place: Path) -> None:
    other = subprocess.Popen(["sleep", "20"])
    try:
        (place / "cgroup.procs").write_text(str(other.pid))
        facts = service(hierarchy, place, ONCE)
        assert f"also holds the processes {other.pid}; start the service in a cgroup of its own" in facts["given"]
        assert (facts["own"], facts["leaf"]) == (str(place), False)
    finally:
        other.kill()
        other.wait()


def test_systemd_must_have_handed_it_over(hierarchy: tuple[Path, str], place: Path) -> None:
    systemd = "delegation.SYSTEMD = '/'\n" + ONCE
    facts = service(hierarchy, place, systemd)
    assert facts["given"] == f"systemd keeps {place} for itself; set Delegate=yes for the unit"
    assert (facts["own"], facts["leaf"]) == (str(place), False)
    os.setxattr(place, "trusted.delegate", b"1")
    facts = service(hierarchy, place, systemd)
    assert (facts["given"], facts["own"]) == (str(place), str(place / LEAF))


def test_the_subgroup_of_systemd_is_a_leaf_already(hierarchy: tuple[Path, str], place: Path) -> None:
    os.setxattr(place, "trusted.delegate", b"1")
    inner = place / "inner"
    inner.mkdir()
    facts = service(hierarchy, inner, "delegation.SYSTEMD = '/'\n" + ONCE)
    assert (facts["given"], facts["own"], facts["leaf"]) == (str(place), str(inner), False)
    assert (place / "cgroup.subtree_control").read_text().split() == [hierarchy[1]]


def test_controllers_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain directory stands for a cgroup without controllers."""
    monkeypatch.setattr(delegation, "locate", lambda *_: [Places(2, str(tmp_path), str(tmp_path))])
    monkeypatch.setattr(delegation, "SYSTEMD", str(tmp_path / "none"))
    assert delegation.find() == f"cgroup v2: {tmp_path} has no controller memory and pids"
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    assert delegation.find() == f"cgroup v2: {tmp_path} has no controller pids"
    monkeypatch.setattr(delegation, "locate", lambda *_: [])
    assert delegation.find() == "no hierarchy with memory and pids is mounted"


def test_a_cgroup_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, text: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "cgroup.controllers").write_text("memory pids\n")
    monkeypatch.setattr(delegation, "locate", lambda *_: [Places(2, str(tmp_path), str(tmp_path))])
    monkeypatch.setattr(delegation, "SYSTEMD", str(tmp_path / "none"))
    monkeypatch.setattr(delegation, "write", refuse)
    found = delegation.find()
    assert found == f"cgroup v2: [Errno 13] Permission denied: '{tmp_path}/cgroup.subtree_control'"
    assert not (tmp_path / LEAF).exists()


def test_names_tell_whether_their_service_lives() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    assert cgroups.ownerless(f"{cgroups.PREFIX}{dead.pid}-x")
    assert not cgroups.ownerless(f"{cgroups.PREFIX}{os.getpid()}-x")
    assert not cgroups.ownerless(LEAF)
    assert not cgroups.ownerless(str(dead.pid))
