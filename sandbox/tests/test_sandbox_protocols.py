"""The protocols of others: their own clients where they are installed, else the requests that those send."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sandbox_server import Server, running_code

ECHO = "print(input())"
PLUS = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
MINUS = PLUS.replace("a + b", "a - b")
ADD = "```python\ndef add(a, b):\n    return a + b\n```"
FORGED = "```python\nimport os\ndef add(a, b):\n    os._exit(0)\n```"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_code() as server:
        yield server


def post(server: Server, path: str, body: Any, status: int = 200) -> Any:
    reply = server.http.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def run(server: Server, source: str, **fields: Any) -> dict[str, Any]:
    return post(server, "/run_code", {"code": source, "language": "python", **fields})


def test_run_code_speaks_as_sandbox_fusion(server: Server) -> None:
    good = run(server, ECHO, stdin="hi", memory_limit_MB=256, files={}, fetch_files=[], compile_timeout=1)
    assert (good["status"], good["message"], good["compile_result"], good["files"]) == ("Success", "", None, {})
    result = good["run_result"]
    assert (result["status"], result["return_code"], result["stdout"], result["stderr"]) == ("Finished", 0, "hi\n", "")
    assert 0 < result["cpu_time"] < 5
    assert result["execution_time"] > 0
    crashed = run(server, "raise ValueError('no')")
    assert (crashed["status"], crashed["run_result"]["status"]) == ("Failed", "Finished")
    assert crashed["run_result"]["return_code"] == 1
    assert "ValueError: no" in crashed["run_result"]["stderr"]
    assert run(server, "import sys; sys.exit(7)")["run_result"]["return_code"] == 7
    slow = run(server, "while True: pass", run_timeout=0.3)
    assert (slow["status"], slow["run_result"]["status"]) == ("Failed", "TimeLimitExceeded")
    greedy = run(server, "x = bytearray(10**9)\nprint(len(x))", memory_limit_MB=64)
    assert greedy["status"] == "Failed"
    assert greedy["run_result"]["return_code"] != 0
    loud = run(server, "while True: print('x' * 10**6)")
    assert loud["status"] == "Failed"
    assert "printed more than" in loud["message"]


def test_run_code_takes_files_and_bounds_them(server: Server) -> None:
    content = base64.b64encode(b"from a file").decode()
    source = "print(open('in.txt').read())"
    assert run(server, source, files={"in.txt": content, "absent": None})["run_result"]["stdout"] == "from a file\n"
    for name in ("/etc/passwd", "../x", "a/../../x", "", "a\0b"):
        refused = post(server, "/run_code", {"code": "1", "language": "python", "files": {name: content}}, 422)
        assert "relative paths" in refused["detail"]
    refused = post(server, "/run_code", {"code": "1", "language": "python", "files": {"x": "§"}}, 422)
    assert "is not base64" in refused["detail"]


def test_what_is_not_supported_is_said(server: Server) -> None:
    refused = post(server, "/run_code", {"code": "1", "language": "python", "fetch_files": ["x"]}, 422)
    assert "fetch_files is not supported" in refused["detail"]
    refused = post(server, "/run_code", {"code": "1", "language": "verilog"}, 422)
    assert "language is 'verilog'" in refused["detail"]
    refused = post(server, "/submit", {"dataset": "mbpp", "id": 3, "completion": "", "config": {}}, 422)
    assert "stores no dataset 'mbpp'" in refused["detail"]


@pytest.mark.parametrize(
    ("language", "source"),
    [("cpp", '#include <cstdio>\nint main() { puts("hi"); }'), ("nodejs", "console.log('hi')")],
)
def test_other_languages_run_where_their_tools_are(server: Server, language: str, source: str) -> None:
    name = {"nodejs": "javascript"}.get(language, language)
    if name not in server.http.get("/v1/capabilities").json()["languages"]:
        pytest.skip(f"{name} is not installed here")
    reply = post(server, "/run_code", {"code": source, "language": language})
    assert (reply["status"], reply["run_result"]["stdout"]) == ("Success", "hi\n")
    broken = post(server, "/run_code", {"code": source[:-2], "language": language})
    assert broken["status"] == "Failed"
    if language == "cpp":
        assert broken["run_result"] is None
        assert "error" in broken["compile_result"]["stderr"]


def submission(completion: str, data: dict[str, Any], **config: Any) -> dict[str, Any]:
    return {"dataset": "d", "id": 5, "completion": completion, "config": {"provided_data": data, **config}}


def test_submit_judges_common_oj(server: Server) -> None:
    tests = [
        {"input": {"stdin": "1 2"}, "output": {"stdout": "3"}},
        {"input": {"stdin": "4 0"}, "output": {"stdout": "4"}},
    ]
    for given in (tests, json.dumps(tests)):
        good = post(server, "/submit", submission(PLUS, {"id": 5, "content": "", "test": given}, language="python"))
        assert (good["id"], good["accepted"]) == (5, True)
        assert good["extracted_code"].startswith("a, b = map")
    bad = post(server, "/submit", submission(MINUS, {"test": tests}))
    assert bad["accepted"] is False
    assert [test["passed"] for test in bad["tests"]] == [False, True]
    assert bad["tests"][0]["test_info"] == tests[0]
    files = [{"input": {"stdin": "1", "a.txt": "2"}, "output": {"stdout": ""}}]
    assert "other files" in post(server, "/submit", submission(PLUS, {"test": files}), 422)["detail"]


def test_submit_judges_asserts_where_the_candidate_cannot_reach_them(server: Server) -> None:
    asserts = "assert add(1, 2) == 3\nassert add(2, 2) == 4\n"
    check = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    for data in ({"test": {"code": asserts}}, {"test": asserts}, {"test": check, "labels": {"entry_point": "add"}}):
        assert post(server, "/submit", submission(ADD, data))["accepted"] is True
        wrong = ADD.replace("a + b", "a * b")
        assert post(server, "/submit", submission(wrong, data))["accepted"] is False
        forged = post(server, "/submit", submission(FORGED, data))
        assert (forged["accepted"], forged["extra"]["trust"] != "inproc") == (False, True)
    two = "```python\ndef f(): return 1\ndef g(): return 2\n```"
    both = post(server, "/submit", submission(two, {"test": "assert f() + g() == 3"}))
    assert (both["accepted"], both["extra"]["trust"] in ("inproc", "unsafe")) == (True, True)


def scalebox(completion: str, cases: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {
        "completion": completion,
        "config": {"language": "python", "provided_data": {"test_cases": cases}, "extra": extra},
    }


def test_scalebox_batches(server: Server) -> None:
    def accepted(body: dict[str, Any]) -> list[bool]:
        reply = post(server, "/common_evaluate_batch", body)
        passed = [test["passed"] for test in reply["tests"]]
        assert reply["accepted"] is all(passed)
        return passed

    stdio = {"type": "stdin_stdout", "input": ["1 2", "3 4"], "output": ["3", "7"], "fn_name": None}
    assert accepted(scalebox(PLUS, stdio, run_all_cases=True)) == [True, True]
    assert accepted(scalebox(MINUS, stdio)) == [False, False]
    call = {"type": "function_call", "input": [[1, 2], [3, 4]], "output": [[3], [8]], "fn_name": "add"}
    assert accepted(scalebox(ADD, {**call, "json_input": False})) == [True, False]
    lines = {**call, "input": ["1\n2", "3\n5"], "output": ["3", "8"], "json_input": True}
    assert accepted(scalebox(ADD, lines)) == [True, True]
    assert accepted(scalebox(ADD, {"type": "assert", "test": "assert add(1, 1) == 2", "entry_point": "add"})) == [True]
    judge = "import sys\nread = lambda p: open(p).read().split()\n"
    judge += "a, b = map(int, read('answer.txt'))\nsys.exit(a + b != int(read('stdin.txt')[0]))"
    special = {"type": "stdin_stdout", "input": ["3", "7"], "output": ["1 2", "3 4"]}
    for program, expected in (("c = int(input())\nprint(c - 1, 1)", True), ("print(1, 1)", False)):
        body = scalebox(f"```python\n{program}\n```", special, special_judge_program=judge)
        assert accepted(body) == [expected] * 2


def test_slime_gets_a_number_or_an_error(server: Server) -> None:
    spec = {"mode": "call", "entry_point": "add", "tests": [{"args": [1, 2], "expected": 3}]}
    for label, response, reward in (
        ("1/2", r"\boxed{0.5}", 1.0),
        (7, r"\boxed{8}", 0.0),
        ({"kind": "code", "spec": spec}, ADD, 1.0),
        (json.dumps({"kind": "code", "spec": spec}), FORGED, 0.0),
        ({"kind": "countdown", "spec": {"numbers": [1, 2], "target": 3}}, "1+2", 1.0),
    ):
        body = {"prompt": [{"role": "user", "content": "?"}], "response": response, "label": label}
        assert post(server, "/rm", body) == reward
    broken = {**spec, "mode": "checker", "tests": [{"stdin": "", "stdout": "1"}], "checker": "import sys; sys.exit(9)"}
    del broken["entry_point"]
    body = {"prompt": "", "response": "```python\nprint(1)\n```", "label": {"kind": "code", "spec": broken}}
    assert "without a verdict" in post(server, "/rm", body, 504)["detail"]
    assert "is refused" in post(server, "/rm", {**body, "label": {"kind": "essay"}}, 422)["detail"]


def gym(text: str, **fields: Any) -> dict[str, Any]:
    message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
    reasoning = {"type": "reasoning", "summary": [{"type": "summary_text", "text": r"\boxed{1}"}]}
    return {"responses_create_params": {"input": []}, "response": {"id": "r", "output": [reasoning, message]}, **fields}


def test_nemo_gym_gets_its_request_back_with_a_reward(server: Server) -> None:
    reply = post(server, "/verify", gym(r"\boxed{42}", expected_answer="42", uuid="u-1"))
    assert (reply["reward"], reply["verdict"], reply["uuid"]) == (1.0, "accepted", "u-1")
    assert reply["responses_create_params"] == {"input": []}
    assert post(server, "/verify", gym("no idea", expected_answer="1"))["reward"] == 0.0
    stdio = {"inputs": ["1 2", "3 4"], "outputs": ["3", "7"], "fn_name": None}
    call = {"inputs": ["1\n2"], "outputs": ["3"], "fn_name": "add"}
    for tests, text, reward in ((stdio, PLUS, 1.0), (stdio, MINUS, 0.0), (call, ADD, 1.0), (call, FORGED, 0.0)):
        assert post(server, "/verify", gym(text, verifier_metadata={"unit_tests": tests}))["reward"] == reward
    own = {"kind": "countdown", "spec": {"numbers": [1, 2], "target": 3}}
    assert post(server, "/verify", gym("<answer>1+2</answer>", verifier_metadata=own))["reward"] == 1.0
    assert "there is no task" in post(server, "/verify", gym("x"), 422)["detail"]


def test_the_client_of_sandbox_fusion(server: Server) -> None:
    client = pytest.importorskip("sandbox_fusion", reason="the PyPI package sandbox-fusion is not installed")
    client.set_endpoint(str(server.http.base_url))
    reply = client.run_code(client.RunCodeRequest(code=ECHO, stdin="hi", language="python"), max_attempts=1)
    assert reply.status == client.RunStatus.Success
    assert reply.run_result.stdout == "hi\n"
    slow = client.run_code(
        client.RunCodeRequest(code="while 1: pass", language="python", run_timeout=0.3), max_attempts=1
    )
    mapping = client.SummaryMapping(Success="ok", Failed="failed", RunTimeout="late", RunFailed="crashed")
    assert client.summary_run_code_result(slow, mapping) == "late"
    crashed = client.run_code(client.RunCodeRequest(code="1/0", language="python"), max_attempts=1)
    assert client.summary_run_code_result(crashed, mapping) == "crashed"
    many = client.run_concurrent(
        client.run_code, args=[[client.RunCodeRequest(code=f"print({n})", language="python")] for n in range(20)]
    )
    assert [each.run_result.stdout for each in many] == [f"{n}\n" for n in range(20)]
    tests = [{"input": {"stdin": "1 2"}, "output": {"stdout": "3"}}]
    config = client.TestConfig(language="python", dataset_type="CommonOJDataset", provided_data={"test": tests})
    request = client.SubmitRequest(dataset="mine", id=1, completion=PLUS, config=config)
    assert client.submit(request, max_attempts=1).accepted is True
    request.completion = MINUS
    assert client.submit(request, max_attempts=1).accepted is False


def verl_utils(folder: Path) -> ModuleType:
    """verl's client module alone, from an installed verl or from its wheel in the folder ``VERL_WHEELS``."""
    name = "verl/utils/reward_score/sandbox_fusion/utils.py"
    wheels = sorted(Path(os.environ.get("VERL_WHEELS", ".")).glob("verl-*.whl"))
    installed = importlib.util.find_spec("verl")
    if installed is not None and installed.origin:
        path = Path(installed.origin).parents[1] / name
    elif wheels:
        zipfile.ZipFile(wheels[-1]).extract(name, folder)
        path = folder / name
    else:
        pytest.skip("verl is neither installed nor is its wheel in the folder that VERL_WHEELS names")
    pytest.importorskip("requests", reason="verl's client needs requests")
    spec = importlib.util.spec_from_file_location("verl_sandbox_fusion_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_client_of_verl(server: Server, tmp_path: Path) -> None:
    verl = verl_utils(tmp_path)
    url = str(server.http.base_url.join("/run_code"))

    def check(generation: str, **in_outs: Any) -> list[Any]:
        return verl.check_correctness(url, in_outs, generation, timeout=2)[0]

    source = "a, b = map(int, input().split())\nprint(a + b)"
    assert check(source, inputs=["1 2", "3 4"], outputs=["3", "8"]) == [True, False]
    assert check("print(", inputs=["1"], outputs=["1"]) == [-2]
    assert check("while True: pass", inputs=["1"], outputs=["1"]) == [-3]
    assert check("raise ValueError", inputs=["1"], outputs=["1"]) == [-2]
    called = check("def add(a, b):\n    return a + b", inputs=["1\n2", "5\n5"], outputs=["3", "11"], fn_name="add")
    assert called == [True, False]
    solution = "class Solution:\n    def add(self, a, b):\n        return a + b"
    assert check(solution, inputs=["1\n2"], outputs=["3"], fn_name="add") == [True]
    many = check(
        "print(int(input()) ** 2)", inputs=[str(n) for n in range(40)], outputs=[str(n * n) for n in range(40)]
    )
    assert many == [True] * 40


def test_verl_retries_what_is_busy(monkeypatch: pytest.MonkeyPatch, server: Server, tmp_path: Path) -> None:
    verl = verl_utils(tmp_path)
    monkeypatch.setattr(verl, "INITIAL_RETRY_DELAY", 0.01)
    statuses: list[int] = []
    post_once = verl.requests.post

    def post_and_note(*arguments: Any, **options: Any) -> Any:
        reply = post_once(*arguments, **options)
        if len(statuses) < 2:
            reply.status_code = 504
        statuses.append(reply.status_code)
        return reply

    monkeypatch.setattr(verl.requests, "post", post_and_note)
    url = str(server.http.base_url.join("/run_code"))
    reply, error = verl.call_sandbox_api(url, "print(1)", None, 1, 1, 100)
    assert (reply["status"], error, statuses) == ("Success", None, [504, 504, 200])
