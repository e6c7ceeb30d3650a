"""Finding the answer that a response commits to, in time linear in its length."""

from __future__ import annotations

import re
from typing import NamedTuple

_OPEN_TAG, _CLOSE_TAG = "<answer>", "</answer>"
_BRACE = re.compile(r"(?P<boxed>\\f?boxed\s*\{)|\\[{}]|[{}]")


class Span(NamedTuple):
    r"""One ``\boxed{…}``: where the command starts, and where its content starts and stops."""

    mark: int
    start: int
    stop: int


def last_tagged(response: str) -> tuple[int, str] | None:
    """The last ``<answer>…</answer>``: where it starts and what it holds, stripped; None without one."""
    start = response.rfind(_OPEN_TAG, 0, max(0, response.rfind(_CLOSE_TAG)))
    if start < 0:
        return None
    return start, response[start + len(_OPEN_TAG) :].partition(_CLOSE_TAG)[0].strip()


def boxed_spans(response: str) -> list[Span]:
    r"""Every ``\boxed{…}`` with balanced braces that holds no other one, in order."""
    spans: list[Span] = []
    opened: list[re.Match[str]] = []
    for brace in _BRACE.finditer(response):
        if brace["boxed"] or brace.group() == "{":
            opened.append(brace)
        elif brace.group() == "}" and opened:
            opening = opened.pop()
            # A box closes after the boxes inside it, so a later start means that none is inside.
            if opening["boxed"] and (not spans or opening.start() > spans[-1].mark):
                spans.append(Span(opening.start(), opening.end(), brace.start()))
    return spans
