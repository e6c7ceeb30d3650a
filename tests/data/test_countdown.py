"""The Countdown task: the enumeration is complete, its answers are right, the split is fixed for ever."""

from __future__ import annotations

import ast
import collections
import hashlib
import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlvr.data import countdown
from megatron_rlvr.data.countdown import Problem, Split


def oracle(problem: Problem, answer: str) -> bool:
    """An independent judgement: characters, digits used, and Python's own arithmetic."""
    if not re.fullmatch(r"[1-9+*()-]+", answer) or re.search(r"\d\d", answer):
        return False
    if any(isinstance(node, ast.UnaryOp | ast.Call) for node in ast.walk(ast.parse(answer, mode="eval"))):
        return False
    used = sorted(int(digit) for digit in re.findall(r"\d", answer))
    return used == list(problem.numbers) and eval(answer) == problem.target


@pytest.fixture(scope="module")
def brute_force() -> collections.Counter[tuple[Problem, str]]:
    """Trees per problem and answer, from Python's own parser and arithmetic: every digit order, operator and shape."""
    trees: collections.Counter[tuple[Problem, str]] = collections.Counter()
    for f, g in itertools.product("+-*", repeat=2):
        for shape in (f"({{}}{f}{{}}){g}{{}}", f"{{}}{f}({{}}{g}{{}})"):
            bare = shape.replace("(", "").replace(")", "")
            # Unrelated large numbers tell parentheses that matter from a coincidence such as 2*(1+1) = 2*1+1+1.
            needed = eval(shape.format(101, 211, 307)) != eval(bare.format(101, 211, 307))
            for digits in itertools.product(range(1, 10), repeat=3):
                low, middle, high = sorted(digits)
                problem = Problem((low, middle, high), eval(shape.format(*digits)))
                if 1 <= problem.target <= 99:
                    trees[problem, (shape if needed else bare).format(*digits)] += 1
    return trees


def test_enumeration_is_complete(brute_force: collections.Counter[tuple[Problem, str]]) -> None:
    listed = [(problem, answer) for problem, answers in countdown.solutions().items() for answer in answers]
    assert listed == sorted(brute_force)
    assert len(countdown.solutions()) == 1864


def test_every_listed_answer_is_right() -> None:
    for problem, answers in countdown.solutions().items():
        assert all(oracle(problem, answer) for answer in answers), (problem, answers)


def test_split_is_disjoint_covering_and_pinned() -> None:
    train, heldout = countdown.problems("train"), countdown.problems("heldout")
    assert not set(train) & set(heldout)
    assert set(train) | set(heldout) == set(countdown.solutions())
    assert len(heldout) == 202
    digest = hashlib.sha256("\n".join(problem.text for problem in heldout).encode()).hexdigest()
    # A change here silently mixes training problems into every held-out figure ever reported.
    assert digest == "2c2c11b85e856eb4a56ac067774a9a1cc8c992688d6d775d15ba876c43d2d7ff"


def test_prompt_carries_the_task() -> None:
    prompt = Problem((2, 5, 9), 7).as_prompt()
    assert (prompt.id, prompt.text, prompt.kind) == ("countdown-259:07", "259:07;", "countdown")
    assert prompt.spec == {"numbers": [2, 5, 9], "target": 7}
    assert {len(problem.text) for problem in countdown.solutions()} == {7}


@given(seed=st.integers(0, 2**32), split=st.sampled_from(["train", "heldout"]))
def test_drawn_answers_are_right_and_stay_on_their_side(seed: int, split: Split) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        problem, answer = countdown.draw_answer(rng, split)
        assert problem.split == split
        assert oracle(problem, answer)
        assert answer in countdown.solutions()[problem]


def test_answers_are_drawn_with_the_stated_weights(brute_force: collections.Counter[tuple[Problem, str]]) -> None:
    """The drawn frequencies match the exact law, trees per answer (chi-square, within four standard deviations)."""
    weights = {pair: trees for pair, trees in brute_force.items() if pair[0].split == "train"}
    rng, draws = random.Random(0), 40_000
    counts = collections.Counter(countdown.draw_answer(rng) for _ in range(draws))
    expected = {pair: draws * trees / sum(weights.values()) for pair, trees in weights.items()}
    statistic = sum((counts[pair] - mean) ** 2 / mean for pair, mean in expected.items())
    degrees = len(expected) - 1
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_draws_are_a_function_of_the_seed(split: Split) -> None:
    first, second = random.Random(3), random.Random(3)
    assert [countdown.draw_answer(first, split) for _ in range(50)] == [
        countdown.draw_answer(second, split) for _ in range(50)
    ]
