"""The math cascade against labelled pairs: nothing wrong gets in, nothing right stays out, every knob does its job."""

from __future__ import annotations

from collections import OrderedDict
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvr_sandbox.checkers import math_answer
from rlvr_sandbox.checkers.math_answer import Stage, judge, judge_math
from rlvr_sandbox.checkers.math_numbers import read_number
from rlvr_sandbox.checkers.math_reading import read
from rlvr_sandbox.specs_math import MathSpec


def accepts(answer: str, gold: str, **policy: Any) -> bool:
    spec = MathSpec(answer=gold, **policy).model_dump()
    return judge(f"so it is \\boxed{{{answer}}}.", spec).verdict == "accepted"


EQUAL = [
    # percent
    ("50%", r"50\%"), ("50", "50%"), ("0.5", "50%"), (r"\frac12", r"50\%"), ("50 percent", "50%"), ("50%", "1/2"),
    # names, chains, approximations
    ("x=5", "5"), ("5", "x=5"), ("x = 4 + 1 = 5", "5"), (r"x \approx 5", "5"),
    (r"\frac{1}{3} \approx 0.333", r"\frac13"),
    # units
    ("5 cm", "5"), ("5", "5 cm"), ("50 mm", "5 cm"), (r"5\,\text{cm}", "5 cm"), ("5 apples", "5 fruits"),
    (r"5 \text{ square centimeters}", r"5\text{ cm}^2"), (r"\$5", "5"), ("5 dollars", r"\$5"), ("500 cents", r"\$5"),
    (r"90^\circ", "90"), ("90", r"90^\circ"), (r"90\text{ degrees}", r"90^{\circ}"), ("5 million", "5000000"),
    # intervals and inequalities
    ("0 <= x < 1", "[0,1)"), (r"0\le x<1", "[0,1)"), ("[0,1)", r"0\leq x<1"), (r"x \ge 3", r"[3,\infty)"),
    (r"3\le x", "x>=3"),
    ("x<1 or x>2", r"(-\infty,1)\cup(2,\infty)"), (r"x\in(-\infty,1)\cup(2,\infty)", "x<1 or x>2"), ("1<x<2", "(1,2)"),
    (r"\mathbb{R}", r"(-\infty,\infty)"), (r"[0,1]\cup[1,2]", "[0,2]"),
    # numbers
    ("1.5e3", "1500"), (r"1.5 \times 10^3", "1500"), ("3 1/2", "3.5"), (r"3\frac{1}{2}", "7/2"), ("1,234", "1234"),
    ("1 234", "1234"), (r"\frac{6}{4}", "1.5"), ("2^{10}", "1024"), (r"0.\overline{3}", "1/3"),
    (r"\$1{,}000.50", "1000.5"),
    ("1.0", "1"), ("+5", "5"), ("5.", "5"), (r"\frac{1}{-2}", "-1/2"), ("010_2", "10_2"), ("\u22125", "-5"),
    # lists, sets, tuples
    ("2,1", "1,2"), (r"\{2,1\}", "1,2"), ("(1,2)", "(1, 2)"), (r"\left(1,\frac{1}{2}\right)", "(1,0.5)"), ("{3}", "3"),
    ("x=1,y=2", "y=2,x=1"), (r"\pm 3", "3,-3"), (r"x=\pm3", r"\{-3,3\}"), (r"1\pm\sqrt2", r"1-\sqrt{2},1+\sqrt{2}"),
    (r"\emptyset", r"\varnothing"), (r"12\text{ and }13", "12,13"),
    # words and letters
    ("(C)", "C"), (r"\text{(C)}", "C"), ("C", "(C)"), ("Paris", "paris"), (r"\text{yes}", "Yes"), ("**5**", "5"),
    # computer algebra
    (r"e^{i\pi}", "-1"), ("-1", r"e^{i\pi}"), ("i", r"\sqrt{-1}"), (r"\sqrt{-1}", "i"), (r"\sqrt{12}", r"2\sqrt3"),
    ("x^2-1", "(x-1)(x+1)"), (r"\frac{\pi}{2}", r"\pi/2"), ("y=2x+1", "2x+1"), ("y-2x=1", "y=2x+1"), ("5!", "120"),
    (r"\binom{10}{3}", "120"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    ("2i+1", "1+2i"),
    (r"2\sqrt{2}\text{ cm}", r"\sqrt8"), (r"4+2\sqrt{3}", r"(1+\sqrt3)^2"), (r"\log_{2} 8", "3"),
    (r"\infty", r"+\infty"),
]  # fmt: skip

DIFFERENT = [
    ("50%", "50"), ("50", "0.5"), ("5", "50%"), ("500", "5"), ("5 million", "5"), ("5 hundred", "5"),
    ("5 squared", "5"),
    # brackets
    ("(1,2)", r"\{1,2\}"), (r"\{1,2\}", "(1,2)"), ("(2,1)", "(1,2)"), ("[1,2]", "(1,2)"), ("[0,1]", "[0,1)"),
    (r"(\sqrt2,1)", r"\{\sqrt2,1\}"), ("x=2,y=1", "x=1,y=2"), ("0<x<1", "[0,1)"), ("x<1", "x>1"), ("y<1", "x<1"),
    ("x<1 or x>3", r"(-\infty,1)\cup(2,\infty)"), ("x=3", "x>3"),
    # near misses
    ("3.14159265", r"\pi"), (r"\frac{22}{7}", r"\pi"), ("0.333333", "1/3"), ("0.3333333333333333333", "1/3"),
    (r"\frac{31415926535897932384626433832795}{10000000000000000000000000000000}", r"\pi"), ("1500.0001", "1.5e3"),
    ("1000000.4999999", "1000000.5"), (r"\frac{1}{906!}", r"\frac{1}{904!}"), ("10^{-201}", "10^{-200}"),
    ("0.3333x", r"\frac13x"),
    # chains and spraying
    ("1=2=5", "5"), ("4=5", "5"), ("5=4", "5"), ("x=4=5", "5"), ("3,4", "3"), ("3 or 4", "4"), (r"3\text{ or }4", "4"),
    ("3;4", "4"), ("3 4", "4"), (r"\{3,4\}", "4"), ("1,2,3", "1,2"), ("1,2", "1,2,3"), ("1,1", "1,2"),
    ("1,2,2", "1,1,2"),
    (r"\pm3", "3"), ("3", r"\pm3"), ("(A) or (B)", "A"), ("A,B", "A"), ("5 (or 6)", "5"), (r"3, \sqrt{2}", r"\sqrt2"),
    # units and bases
    ("5 km", "5 cm"), ("5 cm^2", "5 cm"), ("5 m", "5 cm"), (r"\sqrt2\text{ km}", r"\sqrt2\text{ cm}"), ("10_2", "10"),
    ("10", "10_2"), ("2", "10_2"), ("10_3", "10_2"), (r"5^{\circ}", "5 cm"),
    # forms that only look alike
    ("31/2", "3 1/2"), ("3 1/2", "3/2"), ("1", r"e^{i\pi}"), ("-i", "i"), ("B", "A"), ("silent", "listen"),
    ("no", "yes"),
    ("5x", "5"), ("5", "5x"), ("5i", "5"), (r"\sqrt{13}", r"2\sqrt3"), ("12:00", "1:00"), ("3:2", "2:3"),
    ("1234", "1,2,3,4"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"), ("x+1=5", "5"), ("5 mod 7", "5"),
    ("5<6", "5"),
    # work that is left to do
    (r"\sum_{k=1}^{10}k", "55"), (r"\int_0^1 x dx", "1/2"), (r"\lim_{x\to0}\frac{\sin x}{x}", "1"), ("1/0", "5"),
    ("nan", "5"),
]  # fmt: skip

POLICIES: list[tuple[str, str, dict[str, Any], bool]] = [
    ("50%", "50", {"percent": "ignore"}, True),
    ("50", "50%", {"percent": "value"}, False),
    ("0.5", "50%", {"percent": "value"}, True),
    ("5 km", "5 cm", {"units": "ignore"}, True),
    ("5", "5 cm", {"units": "strict"}, False),
    ("5 apples", "5 pears", {"units": "strict"}, False),
    ("50 mm", "5 cm", {"units": "strict"}, True),
    ("3.1416", r"\pi", {"tolerance": 1e-4}, True),
    ("3.2", r"\pi", {"tolerance": 1e-3}, False),
    ("0.333", "1/3", {"tolerance": 1e-2}, True),
    ("(0.6,2.6667]", r"(\frac{3}{5},\frac{8}{3}]", {"tolerance": 1e-4}, True),
    ("2,1", "1,2", {"ordered": True}, False),
    ("(2,1)", r"\{1,2\}", {"ordered": False}, True),
    ("4=5", "5", {"chain": "last"}, True),
    ("5=4", "5", {"chain": "last"}, False),
    ("1,5", "1.5", {"decimal_comma": True}, True),
    ("1,5", "1.5", {}, False),
    ("9+1", "10", {}, True),
    ("9+1", "10", {"evaluated": True}, False),
    (r"\sqrt{16}", "4", {"evaluated": True}, False),
    ("4+1=5", "5", {"evaluated": True}, True),
    (r"\frac{1}{2}", "0.5", {"evaluated": True}, True),
    ("50%", "50", {"reading": "math_verify"}, True),
]


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_right_answers_are_accepted(answer: str, gold: str) -> None:
    assert accepts(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_wrong_answers_are_not(answer: str, gold: str) -> None:
    assert not accepts(answer, gold)


@pytest.mark.parametrize(("answer", "gold", "policy", "expected"), POLICIES)
def test_each_knob_decides(answer: str, gold: str, policy: dict[str, Any], expected: bool) -> None:
    assert accepts(answer, gold, **policy) == expected


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        (r"\boxed{1} and \boxed{2}", "1,2", "accepted"),
        (r"\boxed{1}, \boxed{2}", "2", "wrong_answer"),
        (r"\boxed{4} or \boxed{5}", "5", "wrong_answer"),
        (r"\boxed{4} no no no no no \boxed{5}", "5", "accepted"),
        (r"a total loss of $\boxed{28}$ percent", "28", "wrong_answer"),
        (r"a total loss of $\boxed{28}$ percent", r"28\%", "accepted"),
        (r"\boxed{3}. Final Answer: The final answer is $4$. I hope it is correct.", "4", "accepted"),
        (r"\boxed{3}. Final Answer: The final answer is $4$. I hope it is correct.", "3", "wrong_answer"),
        (r"$\frac{3}{4}$", "0.75", "accepted"),
        ("x<1 or x>2", r"(-\infty,1)\cup(2,\infty)", "accepted"),
    ],
)
def test_what_counts_as_the_answer_of_a_response(response: str, gold: str, expected: str) -> None:
    assert judge(response, {"answer": gold}).verdict == expected


def test_a_worked_solution_may_be_the_reference() -> None:
    gold = r"Since $x=3$ and $y=4$, the sum is $\boxed{14{,}916}$, which we wanted."
    assert judge(r"\boxed{14916}", {"answer": gold}).verdict == "accepted"


@pytest.mark.parametrize(
    ("answer", "gold", "stage"),
    [
        ("", "5", Stage.EXTRACT),
        ("(" * 60 + "x", "5", Stage.LIMITS),
        ("9" * 1_001, "5", Stage.LIMITS),
        ("x" * 4_097, "5", Stage.LIMITS),
        ("9^{9^{9^{9}}}", r"\sqrt2", Stage.LIMITS),
        ("5!!!", r"\sqrt2", Stage.LIMITS),
        (r"\binom{10^9}{500000000}", "5", Stage.LIMITS),
        ("42", "42", Stage.TEXT),
        ("Paris", "London", Stage.TEXT),
        ("0.5", "1/2", Stage.EXACT),
        (r"3, \sqrt{2}", r"\sqrt{2}", Stage.HEDGE),
        (r"\sqrt{8}", r"2\sqrt2", Stage.SYMBOLIC),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_stage_that_decides_is_named(answer: str, gold: str, stage: Stage) -> None:
    judgement, decided = judge_math(f"\\boxed{{{answer}}}", {"answer": gold})
    assert decided is stage
    assert judge(f"\\boxed{{{answer}}}", {"answer": gold}).flags == (f"stage:{stage}",)
    if stage is Stage.LIMITS:
        assert judgement.detail.startswith("the answer ")


def test_ordinary_answers_need_no_computer_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> bool:
        raise AssertionError("computer algebra")

    monkeypatch.setattr(math_answer.math_symbolic, "equal", forbidden)
    for answer, gold in [("41", "42"), ("0.5", "1/2"), ("(1,3)", "(1,2)"), ("50%", "50"), ("x<1", r"(-\infty,1)")]:
        accepts(answer, gold)


def test_the_cache_is_bounded_and_knows_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answer, "_cache", OrderedDict())
    monkeypatch.setattr(math_answer, "MAX_CACHED", 8)
    for number in range(40):
        accepts(str(number), "7")
    assert len(math_answer._cache) == 8
    assert accepts("50%", "50", percent="ignore")
    assert not accepts("50%", "50")


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_fractions_are_compared_exactly(one: Fraction, other: Fraction) -> None:
    text = f"\\frac{{{one.numerator}}}{{{one.denominator}}}"
    assert accepts(text, f"{other.numerator}/{other.denominator}") == (one == other)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
def test_decimals_are_read_exactly(value: Any) -> None:
    number = read_number(format(value, "f"))
    assert number is not None
    assert number.value == Fraction(str(value))


@given(st.text(alphabet="0123456789.,+-*/^(){}[]\\%<=> xeipmcfracsqrtboxedincuptext", max_size=60))
@settings(max_examples=300)
def test_reading_never_fails_and_equals_itself(text: str) -> None:
    first, second = read(text), read(text)
    assert first == second


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=6, unique=True), st.randoms())
def test_sets_ignore_order_and_tuples_do_not(numbers: list[int], rng: Any) -> None:
    shuffled = numbers[:]
    rng.shuffle(shuffled)
    listed, moved = ", ".join(map(str, numbers)), ", ".join(map(str, shuffled))
    assert accepts(rf"\{{{moved}\}}", rf"\{{{listed}\}}")
    assert accepts(f"({moved})", f"({listed})") == (moved == listed)
    assert not accepts(rf"\{{{moved}, 99\}}", rf"\{{{listed}\}}")
