"""The program under test as a module, and what may be said of the exceptions that it raises."""

from __future__ import annotations

import sys
import types
import typing

MODULE = "solution"
MAX_MESSAGE_CHARS = 500


def load(source: str) -> types.ModuleType:
    """Run ``source`` as the module ``solution``; raises whatever it raises.

    The names of ``typing`` are there without an import, as on the sites that such functions are written for.
    """
    module = types.ModuleType(MODULE)
    module.__dict__.update({name: getattr(typing, name) for name in typing.__all__})
    sys.modules[MODULE] = module
    exec(compile(source, "<solution>", "exec"), module.__dict__)
    return module


def find(module: types.ModuleType, entry_point: str) -> object:
    """What ``entry_point`` names: a name of the module, ``Class.method``, or a method of ``Solution``.

    Raises:
        AttributeError: If there is no such thing.
    """
    owner, _, name = entry_point.rpartition(".")
    if not owner and not hasattr(module, name) and hasattr(module, "Solution"):
        owner = "Solution"
    if not owner:
        return getattr(module, name)
    holder = getattr(module, owner)
    return getattr(holder() if isinstance(holder, type) else holder, name)


def describe(error: BaseException) -> list[str]:
    """The name of the error's type and its message, whatever its ``__str__`` does."""
    try:
        message = str(error)[:MAX_MESSAGE_CHARS]
    except BaseException:  # noqa: BLE001 - the message is the candidate's code
        message = ""
    return [str(type(error).__name__)[:60], message]
