"""Ids outside that no account has, two for each slot: one for its zygote, one for its runs."""

from __future__ import annotations

_FIRST = 61_184
_SLOTS = 2000


def ids_of_slot(slot: int) -> tuple[int, int]:
    """The zygote's id and the runs' id of a slot; slots far apart share theirs."""
    keeper = _FIRST + 2 * (slot % _SLOTS)
    return keeper, keeper + 1
