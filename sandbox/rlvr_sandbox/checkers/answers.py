"""Finding the answer that a response commits to, in time linear in its length."""

from __future__ import annotations

import re

_OPEN_TAG, _CLOSE_TAG = "<answer>", "</answer>"
_BRACE = re.compile(r"(?P<boxed>\\f?boxed\s*\{)|\\[{}]|[{}]")


def last_tagged(response: str) -> tuple[int, str] | None:
    """The last ``<answer>…</answer>``: where it starts and what it holds, stripped; None without one."""
    start = response.rfind(_OPEN_TAG, 0, max(0, response.rfind(_CLOSE_TAG)))
    if start < 0:
        return None
    return start, response[start + len(_OPEN_TAG) :].partition(_CLOSE_TAG)[0].strip()


def last_boxed(response: str) -> tuple[int, str] | None:
    r"""The last ``\boxed{…}`` with balanced braces: where it starts and what it holds, stripped; None without one."""
    last: tuple[int, str] | None = None
    opened: list[re.Match[str]] = []
    for brace in _BRACE.finditer(response):
        if brace["boxed"] or brace.group() == "{":
            opened.append(brace)
        elif brace.group() == "}" and opened:
            opening = opened.pop()
            if opening["boxed"] and (last is None or opening.start() > last[0]):
                last = opening.start(), response[opening.end() : brace.start()].strip()
    return last


def last_marked(response: str) -> str | None:
    r"""The last answer the response marks, by ``\boxed{…}`` or ``<answer>…</answer>``; None when it marks none."""
    marks = [mark for mark in (last_boxed(response), last_tagged(response)) if mark is not None]
    return max(marks)[1] if marks else None
