"""Requests that nobody in their right mind sends: every one is answered, and never with 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sandbox_server import Server, code, countdown, math, program, running_code

PATHS = ("/v1/verify", "/v1/math", "/run_code", "/submit", "/common_evaluate_batch", "/rm", "/verify")
ANSWERS = {200, 400, 413, 415, 422, 429, 501, 504}
RELAXED = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))

_TESTS = {"test": [{"input": {"stdin": "1"}, "output": {"stdout": "1"}}]}
_CASES = {"test_cases": {"type": "function_call", "input": [[1]], "output": [[1]], "fn_name": "f"}}
_CALL = {"mode": "call", "entry_point": "f", "tests": [{"args": [1], "kwargs": {}, "expected": 1}]}
_MESSAGE = {"type": "message", "content": [{"type": "output_text", "text": "1"}]}
GOOD: dict[str, Any] = {
    "/v1/verify": {
        "items": [program("print(1)", "", "1"), countdown("1", [1], 1), math("1", "1"), code("x", _CALL)],
        "deadline_s": 2.0,
        "priority": "train",
    },
    "/v1/math": {"items": [{"gold": "1", "response": "1", "policy": {"units": "ignore"}}], "deadline_s": 2.0},
    "/run_code": {"code": "print(1)", "language": "python", "run_timeout": 1, "stdin": "", "files": {"a": "QQ=="}},
    "/submit": {
        "dataset": "",
        "id": 1,
        "completion": "print(1)",
        "config": {"provided_data": _TESTS, "run_timeout": 1},
    },
    "/common_evaluate_batch": {"completion": "f = abs", "config": {"provided_data": _CASES, "run_timeout": 1}},
    "/rm": {"prompt": "", "response": "1", "label": {"kind": "math", "spec": {"answer": "1"}}},
    "/verify": {"response": {"output": [_MESSAGE]}, "verifier_metadata": {"unit_tests": {"inputs": [], "outputs": []}}},
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, "\ud800", "\0"])
)
names = st.text(max_size=8) | st.sampled_from(["\ud800", "kind", "spec"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_code("--item-seconds", "0.5") as server:
        yield server


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    """``body`` with ``value`` in the place ``path``."""
    if not path:
        return value
    copy = body.copy()
    copy[path[0]] = changed(body[path[0]], path[1:], value)
    return copy


def sent(server: Server, path: str, content: bytes) -> httpx.Response:
    reply = server.http.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code in ANSWERS, (path, content[:500], reply.status_code, reply.text)
    if reply.status_code != 200:
        detail = reply.json()["detail"]
        assert isinstance(detail, str)
        assert "Traceback" not in detail
        assert len(detail) < 600
    return reply


def test_the_requests_that_are_changed_below_are_good(server: Server) -> None:
    for path, body in GOOD.items():
        expected = 422 if path == "/verify" else 200
        assert sent(server, path, json.dumps(body).encode()).status_code == expected


@given(st.data())
@RELAXED
def test_good_requests_with_a_bad_place_are_answered(server: Server, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(PATHS))
    place = data.draw(st.sampled_from(list(places(GOOD[path]))))
    content = json.dumps(changed(GOOD[path], place, data.draw(values))).encode()
    reply = sent(server, path, content)
    if path.startswith("/v1/") and reply.status_code == 200:
        assert len(reply.json()["results"]) == len(json.loads(content)["items"])


@given(st.sampled_from(PATHS), st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
@RELAXED
def test_arbitrary_bodies_are_answered(server: Server, path: str, content: bytes) -> None:
    sent(server, path, content)


@given(st.lists(st.tuples(st.text(max_size=300), st.text(max_size=30)), max_size=8))
@RELAXED
def test_any_response_gets_a_verdict(server: Server, pairs: list[tuple[str, str]]) -> None:
    items = [math(response, answer or "1") for response, answer in pairs]
    items += [countdown(response, [1], 1) for response, _ in pairs]
    items += [program(response, "", f"{answer}1") for response, answer in pairs]
    content = json.dumps({"items": items, "deadline_s": 20}).encode()
    results = sent(server, "/v1/verify", content).json()["results"]
    assert "infra_error" not in [result["verdict"] for result in results]


def test_schemathesis_finds_no_server_error(server: Server) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="the PyPI package schemathesis is not installed")
    schema = schemathesis.openapi.from_url(str(server.http.base_url.join("/openapi.json")))
    names = ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
    conformance = schemathesis.checks.CHECKS.get_by_names(names)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= set(PATHS)
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(RELAXED, max_examples=15)
        def check(case: Any) -> None:
            reply = case.call()
            assert reply.status_code in ANSWERS
            case.validate_response(reply, checks=conformance)

        check()
