"""Equality of plain data, decided here: no method of a candidate's object has a say, and types count."""

from __future__ import annotations

import cmath

from rlvr_sandbox.specs_code import CompareSpec

_NUMBERS = (int, float, complex)


def difference(expected: object, actual: object, compare: CompareSpec, place: str = "") -> str | None:
    """Where ``actual`` first differs from ``expected``, in words, or None where it does not.

    ``True`` is not 1 and NaN equals nothing unless ``compare`` says so; 1 and 1.0 are equal; a tolerance applies where
    one of two numbers is no integer. The keys of dicts and the members of sets are compared without tolerance.

    Args:
        expected: Exact builtins, as the codec decodes them.
        actual: The same.
        compare: The rules.
        place: Path from the outermost value, for the words.
    """
    kind = _kind(expected, compare)
    if kind != _kind(actual, compare):
        return f"{place or 'the value'} is {_named(actual)}, not {_named(expected)}"
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        return _sequences(expected, actual, compare, place)
    if isinstance(expected, dict) and isinstance(actual, dict):
        return _dicts(expected, actual, compare, place)
    if kind == "number":
        same = _same_number(expected, actual, compare)
    else:
        same = freeze(expected, compare) == freeze(actual, compare)
    return None if same else f"{place or 'the value'} is not the expected {_named(expected)}"


def freeze(value: object, compare: CompareSpec) -> object:
    """A hashable stand-in for ``value``; two are equal where the values are, by the rules of ``difference``."""
    if isinstance(value, float | complex) and value != value:
        return ("nan",) if compare.nan_equal else object()
    if isinstance(value, list | tuple):
        return _kind(value, compare), tuple(freeze(part, compare) for part in value)
    if isinstance(value, set | frozenset):
        return "set", frozenset(freeze(part, compare) for part in value)
    return _kind(value, compare), value


def _kind(value: object, compare: CompareSpec) -> str:
    if isinstance(value, bool):
        return "number" if compare.bool_is_int else "bool"
    if isinstance(value, _NUMBERS):
        return "number"
    if isinstance(value, tuple) and compare.tuples_as_lists:
        return "list"
    return "set" if isinstance(value, frozenset) else type(value).__name__


def _named(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _same_number(expected: object, actual: object, compare: CompareSpec) -> bool:
    if expected == actual:
        return True
    if expected != expected and actual != actual:
        return compare.nan_equal
    assert isinstance(expected, _NUMBERS)
    assert isinstance(actual, _NUMBERS)
    if (isinstance(expected, int) and isinstance(actual, int)) or not (compare.float_abs or compare.float_rel):
        return False
    try:
        return cmath.isclose(expected, actual, rel_tol=compare.float_rel, abs_tol=compare.float_abs)
    except OverflowError:  # an integer that no float holds
        return False


def _sequences(
    expected: list[object] | tuple[object, ...],
    actual: list[object] | tuple[object, ...],
    compare: CompareSpec,
    place: str,
) -> str | None:
    if len(expected) != len(actual):
        return f"{place or 'the value'} has {len(actual)} parts, not {len(expected)}"
    for index, (wanted, given) in enumerate(zip(expected, actual, strict=True)):
        if found := difference(wanted, given, compare, f"{place}[{index}]"):
            return found
    return None


def _dicts(
    expected: dict[object, object], actual: dict[object, object], compare: CompareSpec, place: str
) -> str | None:
    if len(expected) != len(actual):
        return f"{place or 'the value'} has {len(actual)} keys, not {len(expected)}"
    given = {freeze(key, compare): value for key, value in actual.items()}
    for index, (key, wanted) in enumerate(expected.items()):
        frozen = freeze(key, compare)
        if frozen not in given:
            return f"{place or 'the value'} lacks the expected key number {index}"
        if found := difference(wanted, given[frozen], compare, f"{place}[key number {index}]"):
            return found
    return None
