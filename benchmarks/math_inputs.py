"""Inputs of ``math_checks.py``: ordinary answers as GSM8K and MATH have them, and answers made to hang a checker."""

from __future__ import annotations

import random

# Reference, and answers to it as models write them: right ones in other dress and wrong ones.
MATH_GOLDS: list[tuple[str, list[str]]] = [
    (r"\frac{3}{4}", ["0.75", r"\dfrac{3}{4}", "3/4", r"\frac{4}{3}", "75\\%"]),
    (r"-\frac{1}{2}", ["-0.5", r"\frac{-1}{2}", r"\frac12"]),
    ("2", ["2.0", "x=2", r"\frac{4}{2}", "3", r"2\text{ cm}"]),
    ("10", ["10", "+10", "12", "1 + 9"]),
    (r"\frac{1}{6}", [r"\tfrac16", "0.1666", "1/6"]),
    ("1, 2, 3", ["3, 2, 1", "{1,2,3}", "1,2", "1, 2 and 3"]),
    ("(3, -2)", ["(3,-2)", r"\left(3,-2\right)", "(-2,3)", r"(x,y)=(3,-2)"]),
    (r"[0, 1)", [r"0 \le x < 1", "[0,1)", "[0,1]", r"x \in [0, 1)"]),
    (r"(-\infty, 2) \cup (3, \infty)", [r"x<2 \text{ or } x>3", r"(-\infty,2)\cup(3,\infty)", r"(2,3)"]),
    (r"90^\circ", ["90", r"90^{\circ}", "80"]),
    (r"50\%", ["50", "0.5", "50 percent", "5"]),
    (r"15\text{ cm}^2", ["15", r"15\text{ square cm}", r"15\text{ cm}", "16"]),
    (r"\$18.50", ["18.5", r"\$18.50", "18.50 dollars", "1850"]),
    ("10,080", ["10080", "10{,}080", "10,080", "10.080"]),
    (r"3.5 \times 10^{-4}", ["0.00035", r"3.5\cdot 10^{-4}", "3.5e-4", "0.0035"]),
    (r"2\frac{1}{3}", ["7/3", r"\frac{7}{3}", "2 1/3", "2.3"]),
    ("1210_3", [r"1210_{3}", "1210_3", "48", "1211_3"]),
    (r"\text{(C)}", ["C", "(C)", "B", r"\text{C}"]),
    (r"\text{even}", ["even", "Even", "odd"]),
    (r"\pm 3", [r"\{-3, 3\}", "3, -3", "3"]),
    ("2^{10}", ["1024", "2^{10}", "1000"]),
    ("120", ["5!", "120", r"\binom{10}{3}", "24"]),
    (r"4\sqrt{3}", [r"4\sqrt{3}", r"\sqrt{48}", r"4\sqrt 2"]),
    (r"\frac{\pi}{3}", [r"\pi/3", r"\frac{\pi}{3}", "60"]),
    (r"x^2 + 2x + 1", [r"(x+1)^2", "x^2+2x+1", "x^2+1"]),
    (r"6 - 5i", [r"6-5i", "-5i+6", "6+5i"]),
    (
        r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}",
        [r"\begin{pmatrix}1\\-2\end{pmatrix}", r"\begin{pmatrix}-2\\1\end{pmatrix}"],
    ),
    (r"y = 2x - 3", ["y=2x-3", "2x-3", "y = -3 + 2x", "y=2x+3"]),
]


def ordinary(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """``count`` pairs (reference, answer), half of them numbers as GSM8K asks for, half from ``MATH_GOLDS``."""
    rng = random.Random(seed)
    pairs: list[tuple[str, str]] = []
    for index in range(count):
        if index % 2:
            gold, answers = rng.choice(MATH_GOLDS)
            pairs.append((gold, rng.choice(answers)))
            continue
        number = rng.choice([rng.randint(1, 400), rng.randint(1_000, 90_000), rng.randint(1, 4_000) / 4])
        written = [f"{number}", f"{number:,}", rf"\${number:,}", f"{number} dollars", f"x = {number}", f"{number + 1}"]
        pairs.append((str(number), rng.choice(written)))
    return pairs


def _grid(side: int, cell: str) -> str:
    return r"\\".join("&".join(cell.format(i=i, j=j, ij=i * j) for j in range(side)) for i in range(side))


def _nest(opening: str, depth: int, inner: str, closing: str) -> str:
    return opening * depth + inner + closing * depth


HANGS: dict[str, str] = {
    "tower of integers": "9^{9^{9^{9}}}",
    "tower of e": "e^{e^{e^{e^{10}}}}",
    "long tower": "2^{2^{2^{2^{2^{2}}}}}",
    "tower of pi": r"\pi^{\pi^{\pi^{\pi}}}",
    "tower of exp": r"\exp(\exp(\exp(\exp(3))))",
    "stacked powers": "((10^{300})^{300})^{300}",
    "huge power": "7^{10000000}",
    "huge root": "(1/3)^{123456789}",
    "tiny power": "10^{-10^{10}}",
    "power of a sum": "(x+1)^{100000}",
    "wide power of a sum": "(x+y+z+1)^{300}",
    "factorial": "10000000!",
    "factorial of a factorial": "((10!)!)!",
    "double factorial": "(10^9)!!",
    "factorial of a power": "(10^8)!",
    "ratio of factorials": "(10^6+1)!/(10^6)!",
    "binomial": r"\binom{10^9}{500000000}",
    "binomial in digits": r"\binom{1000000000}{500000000}",
    "gamma": r"\Gamma(123456789)",
    "zeta": r"\zeta(1000001)",
    "sum of a billion terms": r"\sum_{k=1}^{1000000000} \frac{1}{k}",
    "product of a billion": r"\prod_{k=1}^{1000000000} k",
    "sums in sums": r"\sum_{i=1}^{1000}\sum_{j=1}^{1000}\sum_{k=1}^{1000} ijk",
    "integral": r"\int_0^{\infty} \frac{\sin(x^x)}{e^{x^2}+\log x}\,dx",
    "limit": r"\lim_{x\to 0} \frac{\sin(\tan x)-\tan(\sin x)}{x^7}",
    "60 fractions deep": _nest(r"\frac{1}{1+", 60, "x", "}"),
    "30 fractions deep": "1+" + _nest(r"\cfrac{1}{1+", 30, "x", "}"),
    "3000 parentheses deep": _nest("(", 3_000, "1", ")"),
    "300 parentheses deep": _nest("(", 300, "x", ")"),
    "3000 braces deep": _nest("{", 3_000, "1", "}"),
    "4000 open parentheses": "(" * 4_000,
    "40 roots deep": _nest(r"\sqrt{1+", 40, "x", "}"),
    "45 constant roots deep": _nest(r"\sqrt{2+", 45, "2", "}"),
    "24 sines deep": _nest(r"\sin(", 24, "x", ")"),
    "12 constant functions deep": _nest(r"\sin(\cos(", 12, "1", "))"),
    "20 logarithms deep": _nest(r"\log(", 20, "1000", ")"),
    "set of 500 numbers": r"\{" + ",".join(map(str, range(500))) + r"\}",
    "set of 500 roots": r"\{" + ",".join(rf"\sqrt{{{k}}}" for k in range(500)) + r"\}",
    "set of 60 roots": r"\{" + ",".join(rf"\sqrt{{{k}}}" for k in range(60)) + r"\}",
    "list of 2000": ",".join(["1"] * 2_000),
    "inverse 12x12": r"\begin{pmatrix}" + _grid(12, "a_{{{i}{j}}}") + r"\end{pmatrix}^{-1}",
    "inverse 7x7": r"\begin{pmatrix}" + _grid(7, "a_{{{i}{j}}}") + r"\end{pmatrix}^{-1}",
    "determinant": r"\det\begin{pmatrix}" + _grid(8, "x^{{{ij}}}") + r"\end{pmatrix}",
    "10^6 digits": "7" * 10**6,
    "10^6 decimals": "0." + "3" * 10**6,
    "900 digits under a root": "(" + "7" * 900 + ")^{1/2}",
    "700 terms": "+".join(["x"] * 700),
    "1400 minus signs": "-" * 1_400 + "x",
    "28 roots in roots": "+".join(rf"\sqrt[{k}]{{{k}+\sqrt{{{k + 1}}}}}" for k in range(2, 30)),
    "40 absolute values": _nest("|", 40, "x", "|"),
    "equation of degree 30": "x^{30}+3x^{29}+7x^5+x+1=0",
    "trigonometric equation": r"\sin(x)+\cos(2x)+\tan(3x)=\frac{1}{7}",
    "inequality": r"x^5-3x^4+x^3-x+1 \le \frac{x}{x^2+1}",
    "identity of degree 40": r"\frac{(x+1)^{20}(x-1)^{20}-(x^2-1)^{20}}{\sqrt{x^2+2x+1}}",
    "trigonometric sum": "+".join(rf"\sin^{{{k}}}({k}x)\cos^{{{k}}}(x)" for k in range(2, 14)),
    "600 subscripts": "x_" * 600 + "1",
    "900 root signs": "\u221a" * 900 + "2",
    "1 MB of spaces": " " * 10**6 + "1",
    "4000 backslashes": "\\" * 4_000,
    "600 ands": "1 and " * 600,
}
# These come without a box: the whole response is searched for an answer.
UNMARKED_HANGS: dict[str, str] = {
    "1 MB of text": "the answer is x " * 62_500,
    "1 MB of dollars": "$" * 10**6,
    "1 MB of boxes": r"\boxed{1}, " * 90_000,
}
HANG_GOLDS = ("5", r"\sqrt{2}+x^2", r"\frac{1}{2}", "x^2+3x=0")
