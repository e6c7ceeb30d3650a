"""Python values in JSON: what JSON lacks is written as an object with one key that starts with ``$``.

``{"$tuple": [...]}``, ``{"$set": [...]}``, ``{"$frozenset": [...]}``, ``{"$dict": [[key, value], ...]}``,
``{"$complex": [real, imaginary]}``, ``{"$bytes": base64}``, ``{"$float": "nan" | "inf" | "-inf"}``. Any other object is
a dict with string keys. JSON's own numbers stay ints and floats.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable

MAX_DEPTH = 60


def from_json(value: object, depth: int = 0) -> object:
    """The Python value that ``value`` stands for.

    Raises:
        ValueError: If it is no JSON, is nested deeper than 60, or misuses one of the forms.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"a value is nested deeper than {MAX_DEPTH}; flatten it")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [from_json(part, depth + 1) for part in value]
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} is no JSON; write it as rlvr_sandbox.typed_json says")
    if len(value) == 1 and (name := next(iter(value))) in _FORMS:
        return _build(name, from_json(value[name], depth + 1))
    return {key: from_json(part, depth + 1) for key, part in value.items()}


def to_json(value: object) -> object:
    """The JSON that stands for ``value``; the inverse of ``from_json``.

    Raises:
        ValueError: If something in ``value`` is no plain data.
    """
    if isinstance(value, float) and not float("-inf") < value < float("inf"):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [to_json(part) for part in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and not (len(value) == 1 and next(iter(value)) in _FORMS):
            return {key: to_json(part) for key, part in value.items()}
        return {"$dict": [[to_json(key), to_json(part)] for key, part in value.items()]}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, complex):
        return {"$complex": [to_json(value.real), to_json(value.imag)]}
    if isinstance(value, tuple | set | frozenset):
        return {f"${type(value).__name__}": [to_json(part) for part in value]}
    raise ValueError(f"an object of type {type(value).__name__} is no plain data; give data only")


def _build(name: str, content: object) -> object:
    try:
        return _FORMS[name](content)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"{name} holds what it cannot be made of ({error}); see rlvr_sandbox.typed_json") from error


def _sequence(content: object) -> list[object]:
    if not isinstance(content, list):
        raise TypeError(f"a list is needed, not a {type(content).__name__}")
    return content


def _float(content: object) -> float:
    if content not in ("nan", "inf", "-inf"):
        raise ValueError("only 'nan', 'inf' and '-inf' are written so")
    return float(str(content))


def _complex(content: object) -> complex:
    real, imaginary = _sequence(content)
    if not isinstance(real, int | float) or not isinstance(imaginary, int | float):
        raise TypeError("two numbers are needed")
    return complex(real, imaginary)


def _dict(content: object) -> dict[object, object]:
    pairs = [_sequence(pair) for pair in _sequence(content)]
    return {key: value for key, value in pairs}


_FORMS: dict[str, Callable[[object], object]] = {
    "$tuple": lambda content: tuple(_sequence(content)),
    "$set": lambda content: set(_sequence(content)),
    "$frozenset": lambda content: frozenset(_sequence(content)),
    "$dict": _dict,
    "$complex": _complex,
    "$bytes": lambda content: base64.b64decode(str(content), validate=True),
    "$float": _float,
}
