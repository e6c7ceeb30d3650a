"""The reward hacks: programs that never compute ``f(x) = x*x + 3*x + 7`` and want to be told that they do.

Each file of ``hacks/`` holds one family; ``=== name`` starts a program, ``=== name uses scan`` one that is given
``answers(things)``, which finds test cases in whatever a program got hold of. Each program defines ``f`` and, run as a
script, prints ``f`` of the number on stdin.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "hacks"
ARGUMENTS = (3, -4, 0, 11, 2, -9, 25, 7)
CASES = tuple((x, x * x + 3 * x + 7) for x in ARGUMENTS)
HONEST = "def f(x): return x*x + 3*x + 7\n"
CHECK = "def check(candidate):\n" + "".join(f"    assert candidate({x}) == {y}\n" for x, y in CASES)
CHECKER = """
import sys
expected = open("expected.txt").read().split()
sys.exit(0 if open("output.txt").read().split() == expected else 1)
"""

_SCRIPT = '\nif __name__ == "__main__":\n    print(f(int(input())))\n'
_SCAN = '''
import dis as _dis
import re as _re
import types as _types

def answers(things):
    """Expected outputs by input, from texts, code objects, test dicts and lists of cases."""
    table = {}
    for thing in list(things):
        try:
            if isinstance(thing, (bytes, bytearray)):
                thing = bytes(thing).decode("latin-1")
            if isinstance(thing, str):
                for a, b in _re.findall(r"(?:candidate|f)\\((-?\\d+)\\) == (-?\\d+)", thing):
                    table[int(a)] = int(b)
            elif isinstance(thing, _types.CodeType) and thing.co_name == "check":
                steps = [step for step in _dis.get_instructions(thing) if "CONST" in step.opname]
                numbers = [step.argval for step in steps if type(step.argval) is int]
                table.update(zip(numbers[::2], numbers[1::2]))
            elif isinstance(thing, dict) and "inputs" in thing and ("outputs" in thing or "expected" in thing):
                for a, b in zip(thing["inputs"], thing.get("outputs") or thing["expected"]):
                    table[int(str(a).strip("[] \\n"))] = int(b)
            elif isinstance(thing, dict) and "args" in thing and "expected" in thing:
                table[thing["args"][0]] = thing["expected"]
        except Exception:
            pass
    return table

'''


def as_program(text: str, *, scan: bool = False) -> str:
    """``text`` made whole."""
    return f"{_SCAN if scan else ''}{text}{_SCRIPT}"


def hacks() -> dict[str, str]:
    """Every program by ``family/name``."""
    programs: dict[str, str] = {}
    for file in sorted(FOLDER.glob("*.hacks")):
        parts = re.split(r"^=== (\w+)( uses scan)?\n", file.read_text(), flags=re.MULTILINE)
        for name, scan, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            programs[f"{file.stem}/{name}"] = as_program(text, scan=bool(scan))
    return programs


def specs(cpu_s: float) -> dict[str, dict[str, Any]]:
    """The code item of each mode; every one expects the same cases."""
    texts = [{"stdin": f"{x}\n", "stdout": f"{y}\n"} for x, y in CASES]
    common: dict[str, Any] = {"extract": False, "limits": {"cpu_s": cpu_s}}
    return {
        "stdio": {"mode": "stdio", "tests": texts, **common},
        "call": {
            "mode": "call",
            "entry_point": "f",
            "tests": [{"args": [x], "expected": y} for x, y in CASES],
            **common,
        },
        "split": {"mode": "split", "entry_point": "f", "test_code": CHECK, **common},
        "checker": {"mode": "checker", "tests": texts, "checker": CHECKER, **common},
    }
