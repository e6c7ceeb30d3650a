"""Finding the program in a response, in time linear in its length."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<info>[^\n`]*)$", re.MULTILINE)
_THOUGHT_END = "</think>"
_NAMES = {
    "python": {"python", "py", "python3"},
    "cpp": {"cpp", "c++", "cc", "cxx"},
    "javascript": {"javascript", "js", "node"},
}


def extract_code(response: str, language: str) -> str | None:
    """The last fenced block of ``response`` that is marked as ``language``, else the last one without a mark.

    What a model thinks before ``</think>`` does not count, nor does a block that is never closed.

    Returns:
        The text between the fences, or None where there is no such block.
    """
    _, _, answer = response.rpartition(_THOUGHT_END)
    names = _NAMES.get(language, {language})
    marked: str | None = None
    unmarked: str | None = None
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(answer):
        if opening is None:
            opening = fence
        elif not fence["info"].strip() and fence["mark"].startswith(opening["mark"]):
            words = opening["info"].split()
            text = answer[opening.end() + 1 : max(opening.end() + 1, fence.start())]
            if not words:
                unmarked = text
            elif words[0].lower().strip("{}.") in names:
                marked = text
            opening = None
    return marked if marked is not None else unmarked
