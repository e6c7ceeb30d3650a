"""What modules ask to have done after each fork: nothing that a zygote of one thread needs, but dear in each run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

_register = os.register_at_fork
_wishes: list[dict[str, Callable[[], Any]]] = []


def note() -> None:
    """From now on note what modules ask for; ``threading`` and ``random`` do when they are imported."""
    os.register_at_fork = lambda **wish: _wishes.append(wish)


def forget() -> None:
    """From now on do what modules ask for."""
    os.register_at_fork = _register


def restore() -> None:
    """In a run that may fork itself: do what was noted after its own forks."""
    for wish in _wishes:
        _register(**wish)
