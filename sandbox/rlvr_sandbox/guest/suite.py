"""Running a piece of test code: ``check(candidate)``, ``unittest`` cases, ``test_`` functions, or plain asserts."""

from __future__ import annotations

import inspect
import unittest
from dataclasses import dataclass
from typing import Any

from rlvr_sandbox.guest.solution import describe

PASSED, FAILED, BROKEN = "passed", "failed", "broken"


@dataclass(frozen=True, slots=True)
class Report:
    """What came of test code: ``status`` is ``passed``, ``failed``, or ``broken`` where the fault is the tests'."""

    status: str
    detail: str = ""


class _Failed(Exception):  # noqa: N818
    """One unit of the tests did not pass."""


def run(code: str, namespace: dict[str, Any], candidate: object) -> Report:
    """Run ``code`` in ``namespace`` and then whatever tests it defined there; ``check`` is given ``candidate``."""
    try:
        program = compile(code, "<tests>", "exec")
    except (SyntaxError, ValueError) as error:
        return Report(BROKEN, f"test_code does not compile ({error})"[:200])
    defined_before = dict(namespace)
    try:
        exec(program, namespace)
        _run_units({k: v for k, v in namespace.items() if defined_before.get(k) is not v}, candidate)
    except _Failed as failure:
        return Report(FAILED, str(failure)[:200])
    except Exception as error:  # noqa: BLE001 - whatever the tests raise fails them
        return Report(FAILED, ": ".join(filter(None, describe(error)))[:200])
    except BaseException as error:  # noqa: BLE001 - SystemExit of test code must not pass for an orderly end
        return Report(BROKEN, ": ".join(filter(None, describe(error)))[:200])
    return Report(PASSED)


def _run_units(defined: dict[str, Any], candidate: object) -> None:
    check = defined.get("check")
    if inspect.isfunction(check):
        check(candidate)
    for name, unit in defined.items():
        if isinstance(unit, type) and issubclass(unit, unittest.TestCase):
            _run_cases(unit)
        elif name.startswith("test") and inspect.isfunction(unit):
            unit()


def _run_cases(cases: type[unittest.TestCase]) -> None:
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(cases).run(result)
    if result.wasSuccessful() and not result.skipped:
        return
    for test, trace in (*result.failures, *result.errors, *result.skipped):
        raise _Failed(f"{test.id().rpartition('.')[2]}: {trace.strip().splitlines()[-1] if trace.strip() else ''}")
    raise _Failed("a test that should fail passed")
