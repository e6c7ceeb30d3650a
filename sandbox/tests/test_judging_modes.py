"""Every mode on a real executor: what is accepted, what is not, and what is said of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from rlvr_sandbox.execution import Executor
from rlvr_sandbox.isolation import open_executor
from rlvr_sandbox.judging import judge_code
from rlvr_sandbox.specs_code import CodeSpec
from rlvr_sandbox.verdicts import Judgement, SandboxError, Trust, Verdict

STACK = """
class Stack:
    limit = 3
    def __init__(self, *items): self.items = list(items)
    def push(self, item):
        if len(self.items) >= self.limit: raise OverflowError("full")
        self.items.append(item)
        return self
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __contains__(self, item): return item in self.items
    def __getitem__(self, index): return self.items[index]
    def __str__(self): return "Stack of " + str(len(self.items))
    def drain(self):
        while self.items: yield self.items.pop()
LIMIT = 3
"""
STACK_TESTS = """
import unittest
from solution import LIMIT, Stack

class Tests(unittest.TestCase):
    def test_use(self):
        stack = Stack(1)
        self.assertEqual(len(stack), 1)
        self.assertIs(type(stack.push(2)), type(stack))
        self.assertEqual(stack[1], 2)
        self.assertIn(2, stack)
        self.assertNotIn(7, stack)
        self.assertEqual(str(stack), "Stack of 2")
        self.assertEqual(LIMIT, 3)
        with self.assertRaises(OverflowError):
            stack.push(3).push(4)
        self.assertEqual([next(stack.drain()), *stack.drain()], [3, 2, 1])
        with self.assertRaises(IndexError):
            stack.pop()
        stack.limit = 9
        self.assertEqual(stack.limit, 9)

def test_more():
    assert Stack().items == []
"""
# Answers each look at it as the test at hand likes it.
CHAMELEON = """
class Chameleon:
    def __init__(self, items): self.items = items
    def __iter__(self): return iter(self.items)
    def __len__(self): return len(self.items)
    def __getitem__(self, index): return 0
f = Chameleon
"""
SORTED = """
result = f([3, 1, 2])
assert sorted(result) == [1, 2, 3]
assert all(result[i] <= result[i + 1] for i in range(2))
"""


class Judge:
    """An executor behind a plain function."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.executor: Executor = self.loop.run_until_complete(self.open())

    async def open(self) -> Executor:
        try:
            return await open_executor("auto", slots=2)
        except SandboxError:  # This machine cannot isolate; what the modes promise must hold all the same.
            return await open_executor("none", slots=2, unsafe=True)

    def __call__(self, response: str, **spec: Any) -> Judgement:
        spec.setdefault("extract", False)
        spec.setdefault("limits", {"cpu_s": 1.0})
        return self.loop.run_until_complete(judge_code(self.executor, CodeSpec.model_validate(spec), response))

    def close(self) -> None:
        self.loop.run_until_complete(self.executor.close())
        self.loop.close()


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    judge = Judge()
    yield judge
    judge.close()


def stdio(*cases: tuple[str, str], **rest: Any) -> dict[str, Any]:
    return {"mode": "stdio", "tests": [{"stdin": given, "stdout": wanted} for given, wanted in cases], **rest}


def call(*cases: tuple[list[Any], Any], **rest: Any) -> dict[str, Any]:
    tests = [{"args": args, "expected": expected} for args, expected in cases]
    return {"mode": "call", "entry_point": "f", "tests": tests, **rest}


def split(test_code: str, **rest: Any) -> dict[str, Any]:
    return {"mode": "split", "entry_point": "f", "test_code": test_code, **rest}


SUM = stdio(("1 2\n", "3\n"), ("5 5\n", "10\n"))
ADD = call(([1, 2], 3), ([5, 5], 10))
CHECK_ADD = split("def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(5, b=5) == 10\n")


@pytest.mark.parametrize(
    ("program", "spec", "verdict", "words"),
    [
        ("print(sum(map(int, input().split())))", SUM, Verdict.ACCEPTED, ""),
        ("print(3)", SUM, Verdict.WRONG_ANSWER, "output"),
        ("print(3); 1/0", SUM, Verdict.RUNTIME_ERROR, "ZeroDivisionError"),
        ("print(3); raise SystemExit(2)", SUM, Verdict.RUNTIME_ERROR, "exit status 2"),
        ("while True: pass", SUM, Verdict.TIME_LIMIT, ""),
        ("import time; time.sleep(60)", {**SUM, "limits": {"cpu_s": 0.2}}, Verdict.TIME_LIMIT, ""),
        ("print('x' * (1 << 22))", SUM, Verdict.OUTPUT_LIMIT, ""),
        ("print(", SUM, Verdict.COMPILE_ERROR, "SyntaxError"),
        ("x = 'a\0b'", SUM, Verdict.COMPILE_ERROR, "null"),
        ("print(3)", {**SUM, "run_all": True}, Verdict.WRONG_ANSWER, "1 of 2 tests"),
        ("", SUM, Verdict.NO_ANSWER, ""),
        ("def f(a, b): return a + b", ADD, Verdict.ACCEPTED, ""),
        ("class Solution:\n  def f(self, a: Optional[int], b): return a + b", ADD, Verdict.ACCEPTED, ""),
        ("f = lambda *args: 3", ADD, Verdict.WRONG_ANSWER, "not the expected int"),
        ("f = lambda *args: 3", {**ADD, "run_all": True}, Verdict.WRONG_ANSWER, "1 of 2 tests"),
        ("f = lambda *args: object()", ADD, Verdict.WRONG_ANSWER, "no plain data"),
        ("def f(a, b): raise KeyError('k')", ADD, Verdict.RUNTIME_ERROR, "KeyError: 'k'"),
        ("def f(a, b): raise MemoryError", ADD, Verdict.MEMORY_LIMIT, "MemoryError"),
        ("def f(a, b): raise SystemExit(0)", ADD, Verdict.RUNTIME_ERROR, "SystemExit"),
        ("import os\ndef f(a, b): os._exit(0)", ADD, Verdict.RUNTIME_ERROR, "ended before"),
        ("g = 1", ADD, Verdict.RUNTIME_ERROR, "no attribute 'f'"),
        ("def f(a, b):\n  while True: pass", ADD, Verdict.TIME_LIMIT, ""),
        ("return 1", ADD, Verdict.COMPILE_ERROR, "outside function"),
        ("def f(l): l.sort()", call(([[3, 1]], [1, 3]), inplace=True), Verdict.ACCEPTED, ""),
        ("def f(l): l.sort()", call(([[3, 1]], [1, 3])), Verdict.WRONG_ANSWER, "None"),
        ("def f(l): return sorted(l)", call(([[3, 1]], [1, 3]), inplace=True), Verdict.ACCEPTED, ""),
        (
            "def f(x): return {x: {3}}",
            call(([{"$tuple": [1]}], {"$dict": [[{"$tuple": [1]}, {"$set": [3]}]]})),
            Verdict.ACCEPTED,
            "",
        ),
        ("def f(a, b): return a + b", CHECK_ADD, Verdict.ACCEPTED, ""),
        ("def f(a, b): return 3", CHECK_ADD, Verdict.WRONG_ANSWER, "AssertionError"),
        ("def f(a, b): return None", split("assert f(1, 2)[0] == 3"), Verdict.WRONG_ANSWER, "TypeError"),
        ("def f(a): return a", split("assert f(1) == 1"), Verdict.ACCEPTED, ""),
        ("import os\ndef f(a): os._exit(0)", split("assert f(1) == 1"), Verdict.RUNTIME_ERROR, "ended before"),
        ("def f(a): raise SystemExit(0)", split("f(1)"), Verdict.WRONG_ANSWER, "SystemExit"),
        ("def f(a):\n  while True: pass", split("f(1)"), Verdict.TIME_LIMIT, ""),
        ("f = 3", split("assert f == 3"), Verdict.WRONG_ANSWER, "data"),
        ("def f(a): raise StopIteration", split("for x in map(f, [1]): assert x == 1"), Verdict.WRONG_ANSWER, "StopIt"),
        (
            "def f(l): l.clear(); return l",
            split("l = [2, 1]\nassert f(l) == sorted(l)"),
            Verdict.WRONG_ANSWER,
            "Assert",
        ),
        ("def f(l): l.sort()", split("l = [2, 1]\nf(l)\nassert l == [1, 2]", inplace=True), Verdict.ACCEPTED, ""),
        ("def f(d): d[1] = {2}", split("d = {}\nf(d)\nassert d == {1: {2}}", inplace=True), Verdict.ACCEPTED, ""),
        ("f = lambda a: a", split("assert f(lambda: 0)"), Verdict.INFRA_ERROR, "mode 'inproc'"),
        ("f = lambda a: a", split("assert 1 + 1 == 2"), Verdict.INFRA_ERROR, "never calls"),
        ("f = lambda a: a", split("f(1)\nhelper(1)"), Verdict.WRONG_ANSWER, "NameError"),
        ("f = lambda a: a", split("assert nothing"), Verdict.INFRA_ERROR, "before it calls"),
        ("f = lambda a: a", split("def check(:"), Verdict.INFRA_ERROR, "does not compile"),
        ("f = lambda a: a", split("f(1)\nraise SystemExit(0)"), Verdict.INFRA_ERROR, "SystemExit"),
        ("f = lambda a: a", split("f(1)\nimport os\nos._exit(0)"), Verdict.INFRA_ERROR, "tests ended"),
        ("f = lambda a: 'x' * a", split("print(f(1 << 21) * 2)"), Verdict.OUTPUT_LIMIT, "tests ended"),
        ("f = lambda a: 1", split("f(1)\nwhile True: pass"), Verdict.TIME_LIMIT, "tests ended"),
        (STACK, {**split(STACK_TESTS), "entry_point": "Stack", "objects": True}, Verdict.ACCEPTED, ""),
        (STACK, {**split(STACK_TESTS), "entry_point": "Stack"}, Verdict.WRONG_ANSWER, "no plain data"),
        (CHAMELEON, split(SORTED), Verdict.WRONG_ANSWER, "no plain data"),
        (
            "class A: __eq__ = lambda *a: True\nf = A",
            split("assert f() == 1", objects=True),
            Verdict.WRONG_ANSWER,
            "TypeError",
        ),
        (
            "class A: __eq__ = lambda *a: True\nf = A",
            split("assert f()", objects=True),
            Verdict.WRONG_ANSWER,
            "TypeError",
        ),
        (
            "class A: __eq__ = lambda *a: True\nf = A",
            split("assert f() in [1]", objects=True),
            Verdict.WRONG_ANSWER,
            "TypeError",
        ),
        ("class A(int): __eq__ = lambda *a: True\nf = A", split("assert f() == 1"), Verdict.WRONG_ANSWER, "Assertion"),
    ],
)
def test_verdicts(judge: Judge, program: str, spec: dict[str, Any], verdict: Verdict, words: str) -> None:
    judgement = judge(program, **spec)
    assert judgement.verdict is verdict, judgement
    assert words in judgement.detail
    assert judgement.trust is (Trust.UNSAFE if judge.executor.name == "none" else Trust.ISOLATED)


CHECKER = """
import sys
text = open("output.txt").read()
if text.strip() == "crash": raise SystemExit(3)
if text.strip() == "hang":
    while True: pass
a, b = map(int, text.split())
sys.exit(a + b != int(open("input.txt").read()))
"""


@pytest.mark.parametrize(
    ("program", "reference", "verdict", "words"),
    [
        ("n = int(input()); print(n - 1, 1)", "2 2", Verdict.ACCEPTED, ""),
        ("print(1, 1)", "2 2", Verdict.WRONG_ANSWER, ""),
        ("print('words')", "2 2", Verdict.WRONG_ANSWER, "ValueError"),
        ("print('crash')", "2 2", Verdict.WRONG_ANSWER, "accepts the reference"),
        ("print('hang')", "2 2", Verdict.WRONG_ANSWER, "accepts the reference"),
        ("print('crash')", "", Verdict.INFRA_ERROR, "exit status 3"),
        ("1/0", "2 2", Verdict.RUNTIME_ERROR, "ZeroDivisionError"),
        ("print(open('expected.txt').read())", "2 2", Verdict.RUNTIME_ERROR, "FileNotFoundError"),
    ],
)
def test_checker(judge: Judge, program: str, reference: str, verdict: Verdict, words: str) -> None:
    tests = [{"stdin": "4", "stdout": reference}]
    judgement = judge(program, mode="checker", tests=tests, checker=CHECKER)
    assert judgement.verdict is verdict, judgement
    assert words in judgement.detail


@pytest.mark.parametrize(
    ("program", "test_code", "verdict"),
    [
        (
            "import math\ndef f(x): return math.floor(x)",
            "def check(c):\n    assert c(1.5) == math.floor(1.7)",
            "accepted",
        ),
        ("def f(x): return 0", "def test_f():\n    assert f(1.5) == 1", "wrong_answer"),
        ("def f(x): return 0", "def check(", "infra_error"),
        ("import os\nos._exit(0)", "assert f(1) == 1", "runtime_error"),
        ("import os\ndef f(x): os._exit(0)", "assert f(1) == 1", "runtime_error"),
        ("def f(x): raise SystemExit(0)", "f(1)", "wrong_answer"),
        (
            "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nf = abs",
            "f(1)",
            "wrong_answer",
        ),
    ],
)
def test_inproc_is_labelled(judge: Judge, program: str, test_code: str, verdict: str) -> None:
    judgement = judge(program, mode="inproc", entry_point="f", test_code=test_code)
    assert judgement.verdict == verdict, judgement
    assert judgement.trust is (Trust.UNSAFE if judge.executor.name == "none" else Trust.INPROC)


def test_the_program_is_taken_from_the_response(judge: Judge) -> None:
    response = "First\n```python\nprint(0)\n```\nno:\n```python\nprint(sum(map(int, input().split())))\n```\nDone."
    assert judge(response, **{**SUM, "extract": True}).verdict is Verdict.ACCEPTED
    assert judge("I give up.", **{**SUM, "extract": True}).verdict is Verdict.NO_ANSWER


def test_an_expected_output_that_is_empty_is_the_specs_fault(judge: Judge) -> None:
    judgement = judge("pass", **stdio(("", "")))
    assert judgement.verdict is Verdict.INFRA_ERROR
    assert "allow_empty" in judgement.detail
    assert judge("pass", **stdio(("", "")), compare={"allow_empty": True}).verdict is Verdict.ACCEPTED


def test_later_arguments_are_sent_only_after_right_answers(judge: Judge) -> None:
    program = """
seen = []
def f(x):
    seen.append(x)
    raise ValueError(seen)
"""
    judgement = judge(program, **call(([1], 1), ([2], 2)))
    assert judgement.verdict is Verdict.RUNTIME_ERROR
    assert "[1]" in judgement.detail


def test_numpy_results_are_data(judge: Judge) -> None:
    pytest.importorskip("numpy")
    program = "import numpy as np\ndef f(x): return [np.int64(x), np.arange(2), {'k': np.float64(.5)}, np.bool_(True)]"
    limits = {"cpu_s": 5.0, "memory_mb": 1024}
    judgement = judge(program, **call(([1], [1, [0, 1], {"k": 0.5}, True])), limits=limits)
    # An interpreter of the system may come without it.
    assert judgement.verdict is Verdict.ACCEPTED or "No module named 'numpy'" in judgement.detail


def test_many_split_items_at_once_do_not_wait_for_one_another_for_ever(judge: Judge) -> None:
    async def all_of_them() -> list[Judgement]:
        spec = CodeSpec.model_validate({**CHECK_ADD, "extract": False})
        return await asyncio.gather(*(judge_code(judge.executor, spec, "def f(a, b): return a + b") for _ in range(12)))

    judgements = judge.loop.run_until_complete(asyncio.wait_for(all_of_them(), 30))
    assert {judgement.verdict for judgement in judgements} == {Verdict.ACCEPTED}
