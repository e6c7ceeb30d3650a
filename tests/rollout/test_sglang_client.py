"""The client: what counts as an error, which protocol is spoken, and what must never reach a server."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scripted_sglang import DropConnection, ScriptedServer, serve
from sglang_server import release, shared_server, version_spans

from megatron_rlvr.core import RLVRError
from megatron_rlvr.rollout.sglang.client import SGLangClient, SGLangError


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with serve(ScriptedServer()) as scripted:
        yield scripted


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[SGLangClient]:
    made = SGLangClient(server.url, timeout_s=0.5, generate_timeout_s=0.5)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (400, {"success": False, "message": "wrong\nshape"}, "HTTP 400 to /update_weights_from_disk: wrong shape"),
        (200, {"success": False, "message": "rank 1 failed"}, "HTTP 200 to /update_weights_from_disk: rank 1 failed"),
        (400, {"error": {"message": "no such field"}}, "no such field"),
        (422, {"detail": [{"loc": ["body"]}]}, "HTTP 422 .*loc"),
        (500, "Internal Server Error", "HTTP 500 to /update_weights_from_disk: Internal Server Error"),
        (200, "<html>", "not JSON: <html>"),
    ],
)
def test_a_refusal_in_any_shape_is_an_error(
    server: ScriptedServer, client: SGLangClient, status: int, content: Any, message: str
) -> None:
    server.scripts["/update_weights_from_disk"] = lambda body: (status, content)
    with pytest.raises(SGLangError, match=message) as caught:
        client.update_weights_from_disk("/weights", 3)
    assert (caught.value.status, caught.value.endpoint, caught.value.url) == (
        status,
        "/update_weights_from_disk",
        server.url,
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it travels between ranks
    assert server.calls("/update_weights_from_disk")[0]["weight_version"] == "3"


def test_no_reply_is_an_error_in_time(server: ScriptedServer, client: SGLangClient) -> None:
    def hang(body: Any) -> tuple[int, Any]:
        time.sleep(2.0)
        return 200, {}

    def drop(body: Any) -> tuple[int, Any]:
        raise DropConnection

    server.scripts |= {"/generate": hang, "/pause_generation": drop}
    start = time.monotonic()
    with pytest.raises(SGLangError, match=r"did not answer to /generate: nothing came within 0\.5 s"):
        client.generate({})
    assert time.monotonic() - start < 1.5
    with pytest.raises(SGLangError, match="did not answer to /pause_generation") as caught:
        client.pause("retract")
    assert caught.value.status is None
    with pytest.raises(SGLangError, match="Connection refused"):
        SGLangClient("http://127.0.0.1:1").health()


def test_sessions_are_spoken_where_the_server_has_them(server: ScriptedServer, client: SGLangClient) -> None:
    client.begin_weight_update()
    client.end_weight_update()
    assert len(server.calls("/begin_weight_update")) == len(server.calls("/end_weight_update")) == 1
    assert len(server.calls("/openapi.json")) == 1
    del server.paths["/begin_weight_update"]
    older = SGLangClient(server.url)
    older.begin_weight_update()
    older.end_weight_update()
    assert not older.sessions
    assert len(server.calls("/begin_weight_update")) == 1


def test_what_is_too_old_is_refused_in_words(server: ScriptedServer, client: SGLangClient) -> None:
    del server.paths["/weights_checker"]
    with pytest.raises(RLVRError, match=r"has no /weights_checker, .* from version 0\.5\.6 on; give"):
        client.begin_weight_update()


def test_what_would_kill_a_server_is_not_sent(server: ScriptedServer, client: SGLangClient) -> None:
    good = pickle.dumps([("w", torch.ones(3))])
    for payloads in ([good], [good, good[:-9]], [good, good + b"x"], [good, b""]):
        with pytest.raises(ValueError, match=r"payload|pickle"):
            client.update_weights_from_tensor(payloads)
    with pytest.raises(ValueError, match=r"\['weights'\] .* was not released"):
        client.resume_memory_occupation(["weights"])
    assert not server.calls("/update_weights_from_tensor") + server.calls("/resume_memory_occupation")
    client.update_weights_from_tensor([good, good], version=4)
    client.release_memory_occupation(["weights"])
    client.resume_memory_occupation(["weights"])
    with pytest.raises(ValueError, match="was not released"):
        client.resume_memory_occupation(["weights"])
    assert len(server.calls("/resume_memory_occupation")) == 1


def test_every_endpoint_of_the_real_server() -> None:
    _, client = shared_server()
    client.health()
    client.health_generate()
    assert client.sessions == (release() >= (0, 5, 21))
    assert client.tensor_parallel == 1
    client.pause("retract")
    client.flush_cache(5.0)
    client.begin_weight_update()
    before = client.checksums()
    name, tensor = "model.norm.weight", torch.full((64,), 0.5)
    client.update_weights_from_tensor([pickle.dumps([(name, tensor)])], version=12)
    client.end_weight_update()
    after = client.checksums()
    assert [key for key in before[0] if before[0][key] != after[0][key]] == [name]
    assert client.model_info()["weight_version"] == "12"
    client.update_weight_version(13)
    client.continue_generation()
    client.abort_all()
    (sample,) = client.generate({"input_ids": [4, 7], "sampling_params": {"max_new_tokens": 2}})
    assert version_spans(sample) == [{"version": "13", "start": 0, "end": 2}]
    with pytest.raises(SGLangError, match="HTTP 400 to /update_weights_from_disk: Failed to get weights iterator"):
        client.update_weights_from_disk("/nowhere", 14)
    with pytest.raises(SGLangError, match=r"HTTP 400 to /generate: The input .* longer than the model's"):
        client.generate({"input_ids": [4] * 100, "sampling_params": {}})
