"""The ``bwrap`` backend's outer wall: the command that starts a slot's zygote inside bubblewrap."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

from rlvr_sandbox.isolation import rootfs
from rlvr_sandbox.verdicts import SandboxError

_WORK_BYTES = 1 << 30


def command(prefixes: Iterable[str], imports: Iterable[str]) -> list[str]:
    """The command to put before the zygote's own.

    Args:
        prefixes: Where the interpreters are installed.
        imports: Directories that the zygote imports from; its runs do not see those outside of ``prefixes``.

    Raises:
        SandboxError: If bubblewrap is not installed.
    """
    tool = shutil.which("bwrap")
    if tool is None:
        raise SandboxError("backend bwrap needs bubblewrap; install the package bubblewrap or use another backend")
    words = [tool, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000"]
    for path in rootfs.SYSTEM:
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
    for path in rootfs.readable([*prefixes, *imports]):
        words += ["--ro-bind", path, path]
    return [
        *words,
        *("--proc", "/proc", "--dev", "/dev", "--size", str(_WORK_BYTES), "--tmpfs", rootfs.WORK),
        *("--chdir", rootfs.WORK, "--"),
    ]
