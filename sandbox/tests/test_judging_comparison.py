"""Comparators: returned values by type and tolerance, printed text by lines, words and numbers."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvr_sandbox.judging.equality import difference
from rlvr_sandbox.judging.stdout import printed_the_same
from rlvr_sandbox.specs_code import CompareSpec

NAN = float("nan")
INF = float("inf")


def same(expected: object, actual: object, **rules: Any) -> bool:
    return difference(expected, actual, CompareSpec(**rules)) is None


@pytest.mark.parametrize(
    ("expected", "actual", "rules", "equal"),
    [
        (1, 1, {}, True),
        (1, 1.0, {}, True),
        (1.0, 1 + 0j, {}, True),
        (1, True, {}, False),
        (True, 1, {}, False),
        (True, True, {}, True),
        (True, False, {}, False),
        (1, True, {"bool_is_int": True}, True),
        ([True], [1], {}, False),
        ({1}, {True}, {}, False),
        ({True: 0}, {1: 0}, {}, False),
        ({True: 0}, {1: 0}, {"bool_is_int": True}, True),
        (NAN, NAN, {}, False),
        (NAN, NAN, {"nan_equal": True}, True),
        (NAN, 1.0, {"nan_equal": True}, False),
        ([NAN], [NAN], {}, False),
        ({NAN}, {NAN}, {"nan_equal": True}, True),
        ({NAN}, {NAN}, {}, False),
        (NAN, NAN, {"float_abs": 1e9}, False),
        (INF, INF, {}, True),
        (INF, -INF, {"float_rel": 0.5}, False),
        (INF, 1e308, {"float_rel": 0.9}, False),
        (0.3, 0.1 + 0.2, {}, False),
        (0.3, 0.1 + 0.2, {"float_rel": 1e-9}, True),
        (10, 11, {"float_abs": 5.0}, False),
        (10, 11.0, {"float_abs": 5.0}, True),
        (10**400, 1.5, {"float_rel": 0.1}, False),
        (10**400, 10**400, {}, True),
        (1j, 1.0000001j, {"float_rel": 1e-6}, True),
        (None, None, {}, True),
        (None, 0, {}, False),
        (0, None, {}, False),
        ("1", 1, {}, False),
        ("a", b"a", {}, False),
        ("a", "a", {}, True),
        ([], (), {}, True),
        ([], (), {"tuples_as_lists": False}, False),
        ([[1, 2]], ((1, 2),), {}, True),
        ([1, 2], [1, 2, 3], {}, False),
        ([1], {1}, {}, False),
        ({1, 2}, frozenset({2, 1}), {}, True),
        ({(1, 2)}, {(1, 2)}, {}, True),
        ({1: [0.3]}, {1: [0.1 + 0.2]}, {"float_abs": 1e-9}, True),
        ({"a": 1}, {"b": 1}, {}, False),
        ({"a": 1}, {"a": 1, "b": 2}, {}, False),
        ({1: "x"}, {1.0: "x"}, {}, True),
        (0.0, -0.0, {}, True),
    ],
)
def test_values(expected: object, actual: object, rules: dict[str, Any], equal: bool) -> None:
    assert same(expected, actual, **rules) is equal


leaves = st.integers() | st.text() | st.none() | st.booleans()


@given(st.recursive(leaves, lambda part: st.lists(part) | st.dictionaries(leaves, part)))
def test_a_value_equals_itself_and_not_itself_in_a_list(value: object) -> None:
    assert same(value, value)
    assert not same(value, [value])


def test_words_say_where() -> None:
    compare = CompareSpec()
    assert difference([1, {"a": [0]}], [1, {"a": ["0"]}], compare) == "[1][key number 0][0] is str, not int"
    assert difference([1], [1, 2], compare) == "the value has 2 parts, not 1"
    # The integer is too long to be written out.
    assert difference(1, 10**100_000, compare) == "the value is not the expected int"


def same_text(wanted: str, printed: str, **rules: Any) -> bool:
    return printed_the_same(wanted.encode(), printed.encode(), CompareSpec(**rules))


@pytest.mark.parametrize(
    ("wanted", "printed", "rules", "equal"),
    [
        ("3\n", "3", {}, True),
        ("3\n", "3  \n\n", {}, True),
        ("1\n2\n", "1 \r\n2", {}, True),
        ("1\n2", "1 2", {}, False),
        ("1\n2", "1 2", {"output": "tokens"}, True),
        ("1 2", "1  2", {}, False),
        ("1 2", " 1 2", {}, False),
        ("1\n\n2", "1\n2", {}, False),
        ("3\n", "3", {"output": "exact"}, False),
        ("3\n", "3\n", {"output": "exact"}, True),
        ("Yes", "YES", {}, False),
        ("Yes", "YES", {"ignore_case": True}, True),
        ("", "", {}, False),
        (" \n", "", {}, False),
        ("", "x", {}, False),
        ("", "\n", {"allow_empty": True}, True),
        ("", "x", {"allow_empty": True}, False),
        ("0.5", "0.50000001", {}, False),
        ("0.5", "0.50000001", {"float_abs": 1e-6}, True),
        ("x 0.5", "x .5", {"float_rel": 1e-6}, True),
        ("y 0.5", "x .5", {"float_rel": 1e-6}, False),
        ("1000000007", "1000000008", {"float_rel": 1e-3}, False),
        ("3", "3.0", {"float_abs": 1e-9}, True),
        ("0.5", "nan", {"float_abs": 1e9}, False),
        ("nan", "nan", {"float_abs": 1e-9}, True),
        ("0.5", "1e999", {"float_rel": 0.9}, False),
        ("0.5", "0_5", {"float_abs": 9.0}, False),
        ("0.5", "5" * 70, {"float_rel": 0.9}, False),
        ("25", "25\r\b\b11", {}, False),
        ("25", "11\n25", {}, False),
        ("25", "The answer is 25", {}, False),
        ("25", "25\x00", {}, False),
    ],
)
def test_printed_text(wanted: str, printed: str, rules: dict[str, Any], equal: bool) -> None:
    assert same_text(wanted, printed, **rules) is equal


def test_bytes_that_are_no_text_are_compared_too() -> None:
    assert not printed_the_same(b"25", b"\xff\xfe25", CompareSpec(output="tokens", float_abs=1.0))


def test_a_megabyte_of_numbers_takes_no_time() -> None:
    started = time.process_time()
    assert not same_text("0.5 " * 200_000, "0.6 " * 199_999 + "5", float_abs=0.2, output="tokens")
    assert not same_text("1", "9" * (1 << 20), float_abs=0.2)
    assert time.process_time() - started < 5
