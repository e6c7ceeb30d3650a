"""Where this process's control groups are: version 1, version 2, or both beside one another."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

CONTROLLERS = ("memory", "pids")


@dataclass(frozen=True, slots=True)
class Places:
    """Where the service's own cgroup is, for each controller; with version 2 both are the same directory."""

    version: int
    memory: str
    pids: str

    def __str__(self) -> str:
        return f"cgroup v{self.version}"

    @property
    def directories(self) -> list[str]:
        """Each directory once."""
        return sorted({self.memory, self.pids})


def locate(memberships: str, mounts: str) -> list[Places]:
    """Where this process's cgroups are, the best first.

    Args:
        memberships: The text of ``/proc/self/cgroup``, see cgroups(7).
        mounts: The text of ``/proc/self/mountinfo``, see proc(5).
    """
    found: dict[str, str] = {}
    for line in mounts.splitlines():
        fields, _, source = (part.split() for part in line.partition(" - "))
        if len(fields) < 5 or not source or source[0] not in ("cgroup", "cgroup2"):
            continue
        options = source[-1].split(",") if source[0] == "cgroup" else [""]
        for membership in memberships.splitlines():
            _, controllers, path = membership.split(":", 2)
            below = _below(path, _unescaped(fields[3]))
            for controller in set(controllers.split(",")) & set(options) if below is not None else ():
                found.setdefault(controller, os.path.normpath(f"{_unescaped(fields[4])}/{below}"))
    places = [Places(2, found[""], found[""])] if "" in found else []
    return [*places, *([Places(1, *(found[name] for name in CONTROLLERS))] if found.keys() >= {*CONTROLLERS} else [])]


def _below(path: str, root: str) -> str | None:
    """``path`` as seen from ``root``; ``None`` if it is elsewhere."""
    relative = os.path.relpath(path, root)
    return None if relative.startswith("..") or ".." in path.split("/") else relative


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def read(path: str) -> str:
    """The text of a file of the kernel's; empty where it is not there or closed to us."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
