"""The math checker against hand cases: right answers in other dress, near misses, hedged answers, hostile text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvr_sandbox.checkers.math_answer import judge
from rlvr_sandbox.checkers.math_text import marked_answer


def verdict(response: str, answer: str) -> str:
    return judge(response, {"answer": answer}).verdict


def boxed(answer: str) -> str:
    return f"so we get \\boxed{{{answer}}}."


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ 3 }", "3"),
        (r"\boxed {4}", "4"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"<answer>7</answer>", "7"),
        (r"<answer>$\boxed{8}$</answer>", "8"),
        (r"<answer>9</answer> or rather \boxed{10}", "10"),
        (r"\boxed{11} or rather <answer>12</answer>", "12"),
        (r"\boxed{\boxed{13}}", "13"),
        ("14", None),
    ],
)
def test_the_last_mark_is_the_answer(response: str, found: str | None) -> None:
    assert marked_answer(response) == found


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("42", "42"),
        (r"\dfrac{1}{2}", r"\frac12"),
        ("0.5", "1/2"),
        ("0.5.", "1/2"),
        ("x=5", "5"),
        ("x = 4 + 1 = 5", "5"),
        ("f(2) = 5", "5"),
        ("10,000", "10000"),
        ("10{,}000", "10000"),
        (r"\$25", "25"),
        (r"5\text{ cm}", "5"),
        (r"\left(1, 2\right)", "(1,2)"),
        ("4,3", "3,4"),
        ("x=4 or x=3", "3,4"),
        (r"\sqrt{8}", r"2\sqrt2"),
        ("1+2x", "2x+1"),
        ("Paris", "paris"),
        (r"\text{Yes}", "yes"),
        ("(B)", "B"),
        ("B.", "B"),
        ("-3", "\u22123"),
    ],
)
def test_right_answers(answer: str, gold: str) -> None:
    assert verdict(boxed(answer), gold) == "accepted"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("41", "42"),
        ("-42", "42"),
        ("3 or 4", "3"),
        ("3 or 4", "4"),
        (r"3\text{ or }4", "4"),
        (r"3\text{or}4", "4"),
        ("3, 4", "4"),
        ("3; 4", "4"),
        (r"3 \lor 4", "4"),
        (r"4 \& 5", "5"),
        (r"4 \equiv 5", "5"),
        (r"3\pm1", "4"),
        ("3 4", "7"),
        (r"3\quad 4", "7"),
        ("3 4", "34"),
        ("4=5", "5"),
        ("1=2=5", "5"),
        ("x=4=5", "5"),
        ("x=4=5", "x=5"),
        ("x+1=5", "5"),
        ("3,4,5", "3,4"),
        ("silent", "listen"),
        (r"\text{No}", "yes"),
        ("1" * 100_000, "7"),
    ],
    ids=lambda text: text[:20],
)
def test_wrong_and_hedged_answers(answer: str, gold: str) -> None:
    assert verdict(boxed(answer), gold) == "wrong_answer"


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        ("The answer is 42.", "42", "accepted"),
        ("The answer is $\\frac{1}{2}$", "0.5", "accepted"),
        ("so\n#### 17", "17", "accepted"),
        ("The answer is 41.", "42", "wrong_answer"),
        ("The final answer is $3$ or $4$.", "4", "wrong_answer"),
        ("I do not know", "42", "no_answer"),
        ("", "42", "no_answer"),
        (r"\boxed{}", "42", "no_answer"),
        (r"\boxed{ $ $ }", "42", "no_answer"),
        ("<answer></answer>", "42", "no_answer"),
        ("x " * 500_000, "42", "no_answer"),
    ],
    ids=lambda text: text[:20],
)
def test_unmarked_and_empty_answers(response: str, gold: str, expected: str) -> None:
    assert verdict(response, gold) == expected


def test_extraction_is_linear_in_hostile_text() -> None:
    started = time.process_time()
    for text in (r"\boxed{" * 20_000, "<answer>" * 20_000, "{" * 100_000, r"\boxed{}" * 20_000):
        marked_answer(text)
    assert time.process_time() - started < 2


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_are_compared_as_integers(answer: int, gold: int) -> None:
    assert (verdict(boxed(str(answer)), str(gold)) == "accepted") == (answer == gold)
    assert verdict(boxed(f"{answer:,}"), str(answer)) == "accepted"
