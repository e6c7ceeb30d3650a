"""Which interpreter runs SGLang, and which flags its server takes."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.core import RLVRError

Flag = bool | int | float | str | list[int] | list[float] | list[str]

PROBE_TIMEOUT_S = 180.0
# Ours to set, by argument or by launch.
_OWN = frozenset({"model_path", "host", "port"})

# Asked of that interpreter, as each version of SGLang has other flags.
_PROBE = """
import argparse, json, sys
import sglang, torch
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(add_help=False)
ServerArgs.add_cli_args(parser)
names = {}
for action in parser._actions:
    for name in action.option_strings:
        names[name.lstrip("-").replace("-", "_")] = [name, action.nargs == 0]
print("\\n" + json.dumps({"version": sglang.__version__, "cuda": torch.cuda.is_available(), "names": names}))
"""


@dataclass(frozen=True)
class Installation:
    """An environment that SGLang is installed in.

    Attributes:
        python: Its interpreter.
        version: SGLang's version.
        cuda: Whether torch sees a CUDA device there.
        names: The flags of its server by name, such as ``tp_size``: the option and whether it takes no value.
    """

    python: Path
    version: str
    cuda: bool
    names: Mapping[str, tuple[str, bool]]

    def arguments(self, flags: Mapping[str, Flag]) -> list[str]:
        """``flags`` as command-line arguments; a false switch is left out.

        Raises:
            RLVRError: If the server has no such flag, the launcher sets it itself, or the value does not suit it.
        """
        arguments: list[str] = []
        for key, value in flags.items():
            name = key.replace("-", "_")
            if name in _OWN:
                raise RLVRError(f"rollout.sglang.{key} is set by the launcher; remove it")
            if name not in self.names:
                raise RLVRError(
                    f"rollout.sglang.{key}={value} is no argument of SGLang {self.version}'s server"
                    f"{_nearest(name, self.names)}; see '{self.python} -m sglang.launch_server --help'"
                )
            option, switch = self.names[name]
            if switch != isinstance(value, bool):
                wanted = "true or false" if switch else "a value that is neither true nor false"
                raise RLVRError(f"rollout.sglang.{key}={value} does not suit SGLang's {option}; give {wanted}")
            if switch:
                arguments += [option] if value else []
            else:
                arguments += [option, *map(str, value if isinstance(value, list) else [value])]
        return arguments


_TORCHRUN = (
    *("TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_"),
    "GROUP_WORLD_SIZE",
)


def find_python(given: str | Path | None = None) -> Path:
    """The interpreter that runs SGLang.

    Args:
        given: Chosen by the user; None to take ``SGLANG_PYTHON`` from the environment, this interpreter if it has
            SGLang, or that of ``sglang/`` inside this virtual environment, where ``make sglang`` puts it.

    Raises:
        RLVRError: If there is none.
    """
    if given := given or os.environ.get("SGLANG_PYTHON"):
        if not os.access(given, os.X_OK):
            raise RLVRError(f"{given} is not a Python interpreter; give the one of the environment that has SGLang")
        return Path(given).absolute()
    if importlib.util.find_spec("sglang") is not None:
        return Path(sys.executable)
    beside = Path(sys.prefix) / "sglang" / "bin" / "python"
    if not beside.exists():
        raise RLVRError(
            f"SGLang is neither installed for {sys.executable} nor in {beside.parents[1]}; run 'make sglang', or set "
            "SGLANG_PYTHON to the interpreter of an environment that has it"
        )
    return beside


def read_installation(python: Path) -> Installation:
    """Ask ``python`` for its SGLang; takes some seconds, as that imports it.

    Raises:
        RLVRError: If it cannot be imported there.
    """
    try:
        probe = subprocess.run(
            [python, "-c", _PROBE],
            env=server_environment(python, {}),
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise RLVRError(
            f"{python} took over {PROBE_TIMEOUT_S:g} s to import SGLang; try again on a calmer machine"
        ) from None
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or [f"status {probe.returncode}"])[-1]
        raise RLVRError(f"{python} cannot import SGLang ({reason}); run 'make sglang' or mend that environment")
    facts = json.loads(probe.stdout.splitlines()[-1])
    names = {name: (option, switch) for name, (option, switch) in facts["names"].items()}
    return Installation(python, facts["version"], facts["cuda"], names)


def server_environment(python: Path, changes: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process of ``python``: this one's with ``changes``, without what is this process's own.

    A trainer's rank knows from torchrun's variables where its group meets. A server that inherited them would look for
    its own ranks there, and wait.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_TORCHRUN)}
    environment = {**inherited, "PYTHONSAFEPATH": "1", **changes}  # a directory named triton here is no package there
    if python != Path(sys.executable):
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            environment.pop(name, None)
    return environment


def _nearest(name: str, names: Mapping[str, tuple[str, bool]]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (the nearest is {close[0]})" if close else ""
