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


def test_enumeration_is_complete() -> None:
    """Every value that brute force reaches is a problem, and nothing else is."""
    reached = set()
    for numbers in itertools.combinations_with_replacement(range(1, 10), 3):
        for (a, b, c), f, g in itertools.product(itertools.permutations(numbers), "+-*", "+-*"):
            for text in (f"({a}{f}{b}){g}{c}", f"{a}{f}({b}{g}{c})"):
                if 1 <= (value := eval(text)) <= 99:
                    reached.add(Problem(numbers, value))
    assert set(countdown.solutions()) == reached
    assert len(reached) == 1864
    assert list(countdown.solutions()) == sorted(reached)


def test_every_listed_answer_is_right_and_has_no_needless_parentheses() -> None:
    for problem, answers in countdown.solutions().items():
        assert answers
        assert len(set(answers)) == len(answers)
        for answer in answers:
            assert oracle(problem, answer), (problem, answer)
            bare = answer.replace("(", "").replace(")", "")
            assert "(" not in answer or eval(bare) != problem.target or _differs_in_general(answer, bare), answer


def _differs_in_general(answer: str, bare: str) -> bool:
    """Whether the parentheses matter once the digits are replaced by others (2*(1+1) = 2*1+2 is a coincidence)."""
    values = iter((101, 211, 307))
    table = {match.start(): str(next(values)) for match in re.finditer(r"\d", bare)}
    general_bare = "".join(table.get(place, character) for place, character in enumerate(bare))
    values = iter((101, 211, 307))
    general = re.sub(r"\d", lambda _: str(next(values)), answer)
    return bool(eval(general) != eval(general_bare))


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


def test_problems_are_drawn_with_the_stated_weights() -> None:
    """The drawn frequencies match the exact law, trees per problem (chi-square, within four standard deviations)."""
    trees: collections.Counter[Problem] = collections.Counter()
    for (a, b, c), f, g in itertools.product(itertools.product(range(1, 10), repeat=3), "+-*", "+-*"):
        for text in (f"({a}{f}{b}){g}{c}", f"{a}{f}({b}{g}{c})"):
            low, middle, high = sorted((a, b, c))
            trees[Problem((low, middle, high), eval(text))] += 1
    train = set(countdown.problems("train"))
    weights = {problem: count for problem, count in trees.items() if problem in train}
    rng, draws = random.Random(0), 20_000
    counts = collections.Counter(countdown.draw_answer(rng)[0] for _ in range(draws))
    expected = {problem: draws * weight / sum(weights.values()) for problem, weight in weights.items()}
    statistic = sum((counts[problem] - mean) ** 2 / mean for problem, mean in expected.items())
    degrees = len(expected) - 1
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_draws_are_a_function_of_the_seed(split: Split) -> None:
    first, second = random.Random(3), random.Random(3)
    assert [countdown.draw_answer(first, split) for _ in range(50)] == [
        countdown.draw_answer(second, split) for _ in range(50)
    ]
