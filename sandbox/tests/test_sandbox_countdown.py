"""The Countdown checker against hand cases, Python's own arithmetic, hostile text and reasoning-gym's scorer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvr_sandbox.checkers.countdown import MAX_CHARS, MAX_DEPTH, judge

SPEC = {"numbers": [2, 5, 9], "target": 16}

# An expression as (text, operands); brackets go around every inner node, so Python groups it the same way.
trees = st.recursive(
    st.integers(0, 120).map(lambda number: (str(number), [number])),
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", " + ", " - ", " * "]), inner).map(
        lambda node: (f"({node[0][0]}{node[1]}{node[2][0]})", node[0][1] + node[2][1])
    ),
    max_leaves=6,
)


def flat(text: str) -> str:
    """The same expression without its brackets: another value, by precedence."""
    return text.replace("(", "").replace(")", "")


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("2+5+9", "accepted"),
        ("  (9 + 2)+5 \n", "accepted"),
        ("((2)+(5))+9", "accepted"),
        ("so it is <answer> 9+5+2 </answer>.", "accepted"),
        ("<answer>1</answer> no, <answer>9+5+2</answer>", "accepted"),
        ("<answer>9+5+2</answer> no, <answer>9*5*2</answer>", "wrong_answer"),
        ("<answer> and <answer>9+5+2</answer>", "accepted"),
        ("<answer>9+5+2", "no_answer"),
        ("2+5*9", "wrong_answer"),
        ("16", "wrong_answer"),
        ("2+5+9+0", "wrong_answer"),
        ("2+5+9-2+2", "wrong_answer"),
        ("25-9", "wrong_answer"),
        ("2+5+9=16", "no_answer"),
        ("2 5+9", "no_answer"),
        ("02+5+9", "no_answer"),
        ("+2+5+9", "no_answer"),
        ("-2+5+9", "no_answer"),
        ("2--5+9", "no_answer"),
        ("2(5)+9", "no_answer"),
        ("(2)5+9", "no_answer"),
        ("2+5+9)", "no_answer"),
        ("(2+5+9", "no_answer"),
        ("2+5+", "no_answer"),
        ("()", "no_answer"),
        ("2**5+9", "no_answer"),
        ("2//5+9", "no_answer"),
        ("2+5\n+9", "no_answer"),
        ("2.0+5+9", "no_answer"),
        ("2_0+5+9", "no_answer"),
        ("", "no_answer"),
    ],
)
def test_hand_cases(response: str, verdict: str) -> None:
    assert judge(response, SPEC).verdict == verdict


@pytest.mark.parametrize(
    "response",
    [
        "__import__('os').system('true')",
        "9**9**9",
        "\uff12+\uff15+\uff19",
        "\u0662+\u0665+\u0669",
        "2+5+9\u00b2",
        "\x00",
        "2+5+9 # yes",
        "(" * 5_000_000,
        "1" * 100_000,
        "(" * (MAX_DEPTH + 1) + "16" + ")" * (MAX_DEPTH + 1),
        "<answer>" * 20_000,
    ],
    ids=lambda response: repr(response[:12]),
)
def test_hostile_text_is_no_answer(response: str) -> None:
    assert judge(response, SPEC).verdict == "no_answer"


def test_bounds_are_inclusive() -> None:
    assert judge("(" * MAX_DEPTH + "16" + ")" * MAX_DEPTH, {"numbers": [16], "target": 16}).verdict == "accepted"
    longest = "2 +" + " " * (MAX_CHARS - 4) + "3"
    assert len(longest) == MAX_CHARS
    assert judge(longest, {"numbers": [2, 3], "target": 5}).verdict == "accepted"
    assert judge(longest[:3] + " " + longest[3:], {"numbers": [2, 3], "target": 5}).verdict == "no_answer"


@given(trees, st.booleans())
def test_values_are_those_of_python(tree: tuple[str, list[int]], brackets: bool) -> None:
    text = tree[0] if brackets else flat(tree[0])
    value = eval(text)
    assert judge(text, {"numbers": tree[1][::-1], "target": value}).verdict == "accepted"
    assert judge(text, {"numbers": tree[1], "target": value + 1}).verdict == "wrong_answer"
    assert judge(text, {"numbers": [*tree[1], 1], "target": value}).verdict == "wrong_answer"
    assert judge(text, {"numbers": tree[1][1:] or [200], "target": value}).verdict == "wrong_answer"


@given(trees, st.data())
def test_a_mutated_expression_is_never_taken_for_another(tree: tuple[str, list[int]], data: st.DataObject) -> None:
    text = tree[0]
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + data.draw(st.text("0123456789+-*() /x", max_size=3)) + text[at + data.draw(st.integers(0, 2)) :]
    verdict = judge(text, {"numbers": tree[1], "target": eval(tree[0])}).verdict
    assert verdict in ("accepted", "wrong_answer", "no_answer")
    if verdict == "accepted":
        assert eval(text.strip()) == eval(tree[0])


@given(st.text(max_size=300))
def test_any_text_gets_a_verdict(text: str) -> None:
    assert judge(text, SPEC).verdict in ("accepted", "wrong_answer", "no_answer")


def test_agrees_with_reasoning_gym() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    dataset = reasoning_gym.create_dataset(
        "countdown",
        seed=3,
        size=40,
        min_numbers=3,
        max_numbers=4,
        max_value=20,
        min_target=1,
        operators=("+", "-", "*"),
    )
    compared = 0
    for entry in dataset:
        answer, spec = entry["answer"], entry["metadata"]
        if answer.startswith("-") or "(-" in answer or "**" in answer:
            continue  # sympy's spelling, outside the game's grammar
        wrong = answer.replace("+", "-") if "+" in answer else answer.replace("-", "+").replace("*", "+")
        for text in (answer, wrong, f"{answer} + 1"):
            accepted = judge(text, spec).verdict == "accepted"
            assert accepted == (dataset.score_answer(text, entry) == 1.0), (text, spec)
            compared += 1
    assert compared >= 60
