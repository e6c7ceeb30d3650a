r"""The surface of mathematical answers: where an answer stands in a response, and one spelling for equal typography."""

from __future__ import annotations

import re

from rlvr_sandbox.checkers.answers import boxed_spans, last_tagged

MAX_STATEMENT_CHARS = 300
MAX_JOINED_BOXES = 64

_SYMBOLS = str.maketrans(
    {
        **{"\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u00f7": "/", "\u2044": "/"},
        **{"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2248": r"\approx ", "\u2208": r"\in "},
        **{"\u03c0": r"\pi ", "\u221e": r"\infty ", "\u222a": r"\cup ", "\u2229": r"\cap ", "\u221a": r"\sqrt "},
        **{"\u00b2": "^2", "\u00b3": "^3", "\u00b0": r"^\circ ", "\u00b1": r"\pm ", "\u2205": r"\emptyset "},
        **{"\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}", "\u00a0": " "},
    }
)
_RENAMED = {
    **{name: r"\frac" for name in (r"\dfrac", r"\tfrac", r"\cfrac")},
    **{name: r"\text" for name in (r"\mathrm", r"\textbf", r"\mathbf", r"\mbox", r"\textnormal", r"\operatorname")},
    **{name: r"\text" for name in (r"\textit", r"\textrm", r"\hbox", r"\mathit", r"\bf")},
    **{r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge", r"\geqslant": r"\ge", r"\neq": r"\ne"},
    **{r"\lt": "<", r"\gt": ">", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]"},
    **{r"\varnothing": r"\emptyset", r"\degree": r"^\circ", r"\simeq": r"\approx", r"\to": r"\to"},
    **{name: "" for name in (r"\left", r"\right", r"\displaystyle", r"\big", r"\Big", r"\bigg", r"\Bigg")},
    **{name: "" for name in (r"\bigl", r"\bigr", r"\Bigl", r"\Bigr", r"\limits")},
    **{name: " " for name in (r"\quad", r"\qquad", r"\space", r"\hspace")},
}
_COMMAND = re.compile(r"\\[A-Za-z]+")
_GLUED_COMMA = re.compile(r"\s*\{,\s*\}\s*|,\s*\\!\s*")
_UNCLOSED_BOX = re.compile(r"^\s*\\f?boxed\s*\{")
_DOUBLY_ESCAPED = re.compile(r"\\\\(?=[A-Za-z]{2})")
_SPACING = re.compile(r"\\[,;: ]|~")
_DELIMITER = re.compile(r"(?<!\\)\$|\\[()\[\]!]")
_CONSTANT = re.compile(r"\\text\s*\{\s*([ei])\s*\}")
_ROW_END = "\x00"
_QUOTES = ' "\u201c\u201d`*'
_PERCENT_AFTER = re.compile(r"[\s$]*(?:\\?%|percent\b|pct\b)")
_WHOLLY_MATH = re.compile(r"\$\$?([^$]+)\$\$?|\\\[(.+)\\\]|\\\((.+)\\\)", re.DOTALL)
_TEXT_GROUP = re.compile(r"\\text\s*\{([^{}]*)\}")
_CONNECTOR = re.compile(
    r"(?:[^\n]{0,40}?\b(?:and|or)\b|,|;)?(?:\s|[$.,;(){}\[\]]|\\(?:quad|qquad|text|lor|[ ,;()\[\]]))*"
    r"(?:\\?[A-Za-z]\w?(?:_\{?\w{1,9}\}?)?\s*=\s*)?",
    re.IGNORECASE,
)
_FINAL = re.compile(r"final answer(?:[^\n.]{0,80}?) is:?\s*", re.IGNORECASE)
_STATED = re.compile(r"(?:####|\banswer(?: is|:| =))\s*:?\s*", re.IGNORECASE)
_STATEMENT_END = re.compile(r"\.?\s*I hope\b|\.\s|\.?\s*$|\n", re.IGNORECASE)


def unify(text: str) -> str:
    r"""One spelling of ``text``: symbols as commands, spacing and styling gone, words kept in ``\text{…}``."""
    if r"\begin" not in text:
        text = _DOUBLY_ESCAPED.sub(r"\\", text)
    text = _GLUED_COMMA.sub(",", _UNCLOSED_BOX.sub("", text.replace('\\"', '"')).translate(_SYMBOLS))
    text = _SPACING.sub(" ", _DELIMITER.sub("", text.replace(r"\\", _ROW_END))).replace(_ROW_END, r" \\ ")
    text = _COMMAND.sub(lambda command: _RENAMED.get(command.group(), command.group()), text)
    return re.sub(r"\s+", " ", _CONSTANT.sub(r" \1 ", text)).strip(_QUOTES).removesuffix(".").strip()


def plain(unified: str) -> str:
    r"""``unify``'s result without ``\text`` and without spaces that only typography needs; for comparing as text."""
    text = re.sub(r"\s+", " ", _TEXT_GROUP.sub(r" \1 ", unified)).strip().removesuffix(".")
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


def _joined_boxes(response: str) -> tuple[int, str] | None:
    r"""The last ``\boxed`` together with those directly before it, as ``\boxed{1}, \boxed{2}`` is one answer of two."""
    spans = boxed_spans(response)[-MAX_JOINED_BOXES:]
    if not spans:
        return None
    parts = [response[spans[-1].start : spans[-1].stop].strip()]
    if _PERCENT_AFTER.match(response, spans[-1].stop + 1):
        parts[0] += r"\%"
    for left, right in zip(reversed(spans[:-1]), reversed(spans[1:]), strict=True):
        between = response[left.stop + 1 : right.mark]
        if not (len(between) <= 80 and _CONNECTOR.fullmatch(between)):
            break
        part = response[left.start : left.stop].strip()
        if part not in parts:
            parts.insert(0, part)
    return spans[-1].mark, ", ".join(parts)


def _statement(response: str, opening: re.Pattern[str]) -> tuple[int, str] | None:
    """What follows the last ``opening``, up to the end of its sentence; None where nothing short does."""
    found = list(opening.finditer(response))
    if not found:
        return None
    last = found[-1]
    rest = response[last.end() : last.end() + MAX_STATEMENT_CHARS]
    end = _STATEMENT_END.search(rest)
    statement = rest[: end.start()].strip() if end else ""
    return (last.start(), statement) if statement else None


def marked_answer(response: str) -> str | None:
    r"""The answer that the response marks last: ``\boxed{…}``, ``<answer>…</answer>`` or ``final answer is …``."""
    final = _statement(response, _FINAL)
    if final is not None and r"\boxed" in final[1]:
        final = None
    marks = [mark for mark in (_joined_boxes(response), last_tagged(response), final) if mark is not None]
    if not marks:
        return None
    answer = max(marks)[1]
    inner = _joined_boxes(answer)
    return inner[1] if inner is not None else answer


def whole_answer(response: str) -> str | None:
    """The answer that a response of one formula is; ``None`` for every other response."""
    formula = _WHOLLY_MATH.fullmatch(response.strip()) if len(response) <= MAX_STATEMENT_CHARS else None
    return next(group for group in formula.groups() if group) if formula else None


def stated_answer(response: str) -> str | None:
    """What a response states after ``####`` or ``answer is``; ``None`` where it states nothing."""
    found = _statement(response, _STATED)
    return found[1] if found else None
