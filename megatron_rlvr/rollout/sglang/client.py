"""One SGLang server over HTTP: a method per endpoint; a reply that is not what was asked for is an error."""

from __future__ import annotations

import base64
import pickletools
import threading
from collections.abc import Sequence
from typing import Any, Literal

import httpx
import torch

from megatron_rlvr.core import RLVRError
from megatron_rlvr.rollout.sglang.wire import Wire

PauseMode = Literal["abort", "retract", "in_place"]

# The first version with pause modes, bucketed broadcasts, groups that can be left, and checksums is 0.5.6.
_OLDEST = "0.5.6"
_NEEDED = frozenset(
    f"/{name}"
    for name in (
        "generate",
        "health_generate",
        "pause_generation",
        "continue_generation",
        "flush_cache",
        "update_weights_from_disk",
        "update_weights_from_tensor",
        "update_weights_from_distributed",
        "destroy_weights_update_group",
        "update_weight_version",
        "weights_checker",
    )
)
_SESSION = "/begin_weight_update"
# The server drops connections that were idle for 5 s; one that both ends drop at once would look like a failure.
_KEEP_ALIVE_S = 2.0
_CONNECT_TIMEOUT_S = 10.0


class SGLangError(RLVRError):
    """A server refused a request, failed at it, or could not be reached.

    Attributes:
        url: Base URL of the server.
        endpoint: Path that was called.
        status: HTTP status; None if no reply came.
        message: What the server said, or what happened to the connection.
    """

    def __init__(self, url: str, endpoint: str, status: int | None, message: str) -> None:
        super().__init__(url, endpoint, status, message)
        self.url, self.endpoint, self.status, self.message = url, endpoint, status, message

    def __str__(self) -> str:
        outcome = "did not answer" if self.status is None else f"answered HTTP {self.status}"
        return f"the SGLang server at {self.url} {outcome} to {self.endpoint}: {self.message}"


class SGLangClient:
    """Talks to one server (or, for generation alone, to a router); any thread may use it.

    Every method raises `SGLangError` when no reply came in time or the reply is a refusal, ``success: false`` in a
    reply with status 200 included.
    """

    def __init__(self, url: str, *, timeout_s: float = 60.0, generate_timeout_s: float = 600.0) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            url: Base URL, such as ``http://127.0.0.1:30000``.
            timeout_s: Longest wait for the reply to anything but a generation, seconds.
            generate_timeout_s: Longest wait for the reply to a generation, seconds.
        """
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._generate_timeout_s = generate_timeout_s
        self._http = self._client(httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S))
        # A generation has a connection of its own, which can be cut.
        self._generations = self._client(httpx.Limits(max_connections=None, max_keepalive_connections=0))
        self._lock = threading.Lock()
        self._sessions: bool | None = None
        self._tensor_parallel: int | None = None
        self._released: set[str] = set()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._generations.close()

    # Health and facts

    def health(self, timeout_s: float | None = None) -> None:
        """Return if the server is up and has answered a request before; ``timeout_s`` replaces the usual wait."""
        self._healthy("/health", timeout_s)

    def health_generate(self) -> None:
        """Return if the server generates a token now; a scheduler that hangs fails here and not in `health`."""
        self._healthy("/health_generate")

    def model_info(self) -> dict[str, Any]:
        """What is served: ``model_path``, ``weight_version`` and others."""
        return self._object("/model_info", self._get("/model_info"))

    def server_info(self) -> dict[str, Any]:
        """The server's arguments and state, with ``version`` and ``tp_size``."""
        return self._object("/server_info", self._get("/server_info"))

    @property
    def tensor_parallel(self) -> int:
        """Over how many ranks the server shards the model; asked once."""
        with self._lock:
            if self._tensor_parallel is None:
                self._tensor_parallel = int(self.server_info()["tp_size"])
            return self._tensor_parallel

    @property
    def sessions(self) -> bool:
        """Whether weight updates need begin and end (SGLang 0.5.21 and later); asked once.

        Raises:
            RLVRError: If the server lacks an endpoint that every supported version has.
        """
        with self._lock:
            if self._sessions is None:
                paths = set(self._object("/openapi.json", self._get("/openapi.json")).get("paths", ()))
                if missing := sorted(_NEEDED - paths):
                    raise RLVRError(
                        f"the server at {self.url} has no {missing[0]}, so it is not an SGLang server from version "
                        f"{_OLDEST} on; give rollout.sglang the URL of a newer one"
                    )
                self._sessions = _SESSION in paths
            return self._sessions

    # Generation

    def generate(
        self, payload: dict[str, Any], timeout_s: float | None = None, wire: Wire | None = None
    ) -> list[dict[str, Any]]:
        """Send ``payload`` to ``/generate``; one object per sample, prompt-major, within ``timeout_s`` if given.

        Fields: ``text``, ``output_ids`` and ``meta_info`` with ``finish_reason`` and, where ``return_logprob`` was
        asked for, ``output_token_logprobs`` as ``[logprob, id, text]`` (nats, of log_softmax(logits / temperature)).
        Cutting ``wire`` ends the wait; the server then ends the request within seconds.
        """
        sent = self._send("POST", "/generate", payload, timeout_s or self._generate_timeout_s, wire or Wire())
        reply = _content(self.url, "/generate", sent)
        samples = reply if isinstance(reply, list) else [reply]
        if not all(isinstance(sample, dict) for sample in samples):
            raise SGLangError(self.url, "/generate", 200, f"expected samples, got {str(samples)[:200]}")
        return samples

    def abort(self, rid: str, timeout_s: float | None = None) -> None:
        """Abort the request with that id, which returns what it has; nothing if the server does not know it.

        A paused server ends only what had begun. Of a request that waits for the pause to end it notes, from 0.5.21 on,
        that it was told, does nothing, and answers no further abort; hang up on such a one instead.
        """
        self._post("/abort_request", {"rid": rid}, timeout_s)

    def abort_all(self) -> None:
        """Abort every request; each returns what it has, with finish reason ``abort``."""
        self._post("/abort_request", {"abort_all": True})

    def pause(self, mode: PauseMode) -> None:
        """Stop generating: end the requests (abort), requeue them without their cache (retract) or freeze them."""
        self._post("/pause_generation", {"mode": mode})

    def continue_generation(self) -> None:
        """Generate again after `pause`."""
        self._post("/continue_generation", {})

    def flush_cache(self, timeout_s: float) -> None:
        """Drop all cached prefixes, waiting up to ``timeout_s`` for running requests; fails if some still run."""
        reply = self._send("POST", f"/flush_cache?timeout={timeout_s:g}", None, timeout_s + self._timeout_s)
        _raise_for(self.url, "/flush_cache", reply)

    # Weights

    def begin_weight_update(self) -> None:
        """Open the session that tensor and distributed updates need; nothing on servers without sessions."""
        if self.sessions:
            self._post(_SESSION, {})

    def end_weight_update(self) -> None:
        """Close the session; nothing on servers without sessions."""
        if self.sessions:
            self._post("/end_weight_update", {})

    def update_weights_from_disk(self, path: str, version: int | None = None, *, flush_cache: bool = True) -> None:
        """Load a Hugging Face directory that the server can read; a bad path leaves the old weights in place."""
        self._post(
            "/update_weights_from_disk", {"model_path": path, "flush_cache": flush_cache, **_weight_version(version)}
        )

    def update_weights_from_tensor(
        self,
        payloads: Sequence[bytes],
        load_format: str | None = None,
        version: int | None = None,
        *,
        flush_cache: bool = True,
    ) -> None:
        """Load pickled tensors, one payload per tensor-parallel rank of the server (whole tensors, Hugging Face names).

        A payload that does not unpickle and a missing one kill a server, so both are refused here.

        Args:
            payloads: Pickles of ``[(name, tensor)]``, or of a bucket for ``load_format="flattened_bucket"``.
            load_format: How the server reads them; None for pairs.
            version: The weight version to announce; None leaves it.
            flush_cache: Drop cached prefixes after this update.
        """
        if len(payloads) != self.tensor_parallel:
            raise ValueError(f"{len(payloads)} payloads for {self.tensor_parallel} ranks of {self.url}")
        for payload in payloads:
            _check_pickle(payload)
        body = {
            "serialized_named_tensors": [base64.b64encode(payload).decode("ascii") for payload in payloads],
            "load_format": load_format,
            "flush_cache": flush_cache,
        }
        self._post("/update_weights_from_tensor", body | _weight_version(version))

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: Literal["gloo", "nccl"],
    ) -> None:
        """Join a process group as ranks ``rank_offset`` … with one rank per tensor-parallel rank.

        Returns once all ``world_size`` ranks have joined, so call it from a thread and join as rank 0 meanwhile.
        """
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        self._post("/init_weights_update_group", body)

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[torch.dtype],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        load_format: str | None = None,
        version: int | None = None,
        *,
        flush_cache: bool = True,
    ) -> None:
        """Receive broadcasts from rank 0: one per name in this order, or one of bytes for ``flattened_bucket``.

        Returns once they were received, so call it from a thread and broadcast meanwhile.
        """
        body = {
            "names": list(names),
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in dtypes],
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "load_format": load_format,
            "flush_cache": flush_cache,
        }
        self._post("/update_weights_from_distributed", body | _weight_version(version))

    def destroy_weights_update_group(self, group_name: str) -> None:
        """Leave the group of `init_weights_update_group`."""
        self._post("/destroy_weights_update_group", {"group_name": group_name})

    def update_weight_version(self, version: int) -> None:
        """Announce ``version`` for the weights that are served; running requests go on."""
        self._post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    def checksums(self) -> list[dict[str, str]]:
        """For each rank, the server's checksum (hexadecimal) of every tensor it holds."""
        reply = self._object("/weights_checker", self._post("/weights_checker", {"action": "checksum"}))
        try:
            return [{str(name): str(digest) for name, digest in rank["checksums"].items()} for rank in reply["ranks"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise SGLangError(self.url, "/weights_checker", 200, f"no checksums in {str(reply)[:200]}") from error

    # Memory

    def release_memory_occupation(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Give device memory back; the server must be idle. Releasing twice is harmless."""
        self._post("/release_memory_occupation", {"tags": list(tags)})
        self._released.update(tags)

    def resume_memory_occupation(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Take the memory again. A resume without a release kills a server, so it is refused here."""
        if surplus := sorted(set(tags) - self._released):
            raise ValueError(f"{surplus} of {self.url} was not released and cannot be resumed")
        self._post("/resume_memory_occupation", {"tags": list(tags)})
        self._released.difference_update(tags)

    # Transport

    def _client(self, limits: httpx.Limits) -> httpx.Client:
        return httpx.Client(base_url=self.url, trust_env=False, limits=limits)

    def _healthy(self, endpoint: str, timeout_s: float | None = None) -> None:
        _raise_for(self.url, endpoint, self._send("GET", endpoint, None, timeout_s or self._timeout_s))

    def _get(self, endpoint: str) -> Any:
        return _content(self.url, endpoint, self._send("GET", endpoint, None, self._timeout_s))

    def _post(self, endpoint: str, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        return _content(self.url, endpoint, self._send("POST", endpoint, body, timeout_s or self._timeout_s))

    def _delete(self, endpoint: str) -> Any:
        return _content(self.url, endpoint, self._send("DELETE", endpoint, None, self._timeout_s))

    def _send(
        self, method: str, endpoint: str, body: dict[str, Any] | None, timeout_s: float, wire: Wire | None = None
    ) -> httpx.Response:
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S), pool=None)
        try:
            if wire is None:
                return self._http.request(method, endpoint, json=body, timeout=timeout)
            cuttable = {"trace": wire.trace}
            return self._generations.request(method, endpoint, json=body, timeout=timeout, extensions=cuttable)
        except httpx.TimeoutException:
            raise SGLangError(self.url, endpoint, None, f"nothing came within {timeout_s:g} s") from None
        except httpx.RequestError as error:
            raise SGLangError(self.url, endpoint, None, str(error) or type(error).__name__) from error

    def _object(self, endpoint: str, reply: Any) -> dict[str, Any]:
        if not isinstance(reply, dict):
            raise SGLangError(self.url, endpoint, 200, f"expected a JSON object, got {str(reply)[:200]}")
        return reply


def _weight_version(version: int | None) -> dict[str, str]:
    return {} if version is None else {"weight_version": str(version)}


def _content(url: str, endpoint: str, reply: httpx.Response) -> Any:
    """The JSON of a success, None where its body is empty."""
    _raise_for(url, endpoint, reply)
    if not reply.content:
        return None
    try:
        content = reply.json()
    except ValueError:
        raise SGLangError(url, endpoint, reply.status_code, f"not JSON: {reply.text[:200]}") from None
    if isinstance(content, dict) and content.get("success") is False:
        raise SGLangError(url, endpoint, reply.status_code, _message(content))
    return content


def _raise_for(url: str, endpoint: str, reply: httpx.Response) -> None:
    if reply.is_success:
        return
    try:
        message = _message(reply.json())
    except ValueError:
        message = reply.text.strip()[:500] or "no message"
    raise SGLangError(url, endpoint, reply.status_code, message)


def _message(content: Any) -> str:
    """The server's own sentence in any of the places where SGLang puts it."""
    inner = content.get("error", content) if isinstance(content, dict) else content
    message = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
    return " ".join(str(message or content).split())[:500]


def _check_pickle(payload: bytes) -> None:
    """Raise ValueError unless ``payload`` is one whole pickle; nothing of it is executed."""
    end = 0
    for _, _, position in pickletools.genops(payload):
        end = (position or 0) + 1
    if end != len(payload):
        raise ValueError(f"a payload of {len(payload)} bytes holds a pickle of {end}")
