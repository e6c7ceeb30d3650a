"""Assert-style test suites as specifications: split where one function is tested, else in the response's process."""

from __future__ import annotations

import ast
import builtins
from typing import Any


def assert_spec(source: str, entry_point: str | None, code: str) -> dict[str, Any]:
    """The fields ``mode``, ``entry_point`` and ``test_code`` that judge ``code`` by the asserts of ``source``.

    Where ``source`` defines ``check`` and ``entry_point`` names the function, or where the asserts use exactly one name
    that only ``code`` defines, the mode is ``split``, which ``code`` cannot forge. Otherwise it is ``inproc``.
    """
    try:
        tests, tested = ast.parse(source), ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {"mode": "inproc", "test_code": source}
    if entry_point and any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tests.body):
        return {"mode": "split", "entry_point": entry_point, "test_code": source}
    names = _free_names(tests) & _defined_names(tested)
    functions = {node.name for node in tested.body if isinstance(node, ast.FunctionDef)}
    if len(names) != 1 or not names <= functions:
        return {"mode": "inproc", "test_code": source}
    (name,) = names
    return {"mode": "split", "entry_point": name, "test_code": source}


def _free_names(tree: ast.Module) -> set[str]:
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return used - _defined_names(tree) - set(dir(builtins))


def _defined_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    return names
