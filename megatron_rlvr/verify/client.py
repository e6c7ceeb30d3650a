"""Client of the verifier service: every item gets a verdict by the deadline, whatever the service does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

import httpx

from megatron_rlvr.core import Prompt, RLVRError, Verdict

MAX_CHUNK_ITEMS = 512
MAX_CHUNK_CHARS = 8 << 20
CONCURRENT_CHUNKS = 4
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0

_Item = tuple[Prompt, str]


class VerifierClient:
    """Sends responses to the verifier service at ``url`` and returns its verdicts."""

    def __init__(self, url: str, *, deadline_s: float, max_infra_error_share: float) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            url: Base URL of the service, such as ``http://127.0.0.1:8000``.
            deadline_s: Seconds within which one ``verify`` call answers every item.
            max_infra_error_share: Share of a call's items, 0 to 1, that may stay without a verdict.
        """
        self._url = url.rstrip("/")
        self._deadline_s = deadline_s
        self._max_infra_error_share = max_infra_error_share
        # The service is addressed directly: a proxy of the environment would only see local addresses.
        self._http = httpx.Client(base_url=self._url, trust_env=False)

    def __enter__(self) -> VerifierClient:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def verify(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """One verdict for each (prompt, response text), in order, within the deadline.

        Lost connections and 5xx replies are retried until the deadline; items still unanswered then are
        ``INFRA_ERROR``, which must never become a reward.

        Raises:
            RLVRError: If the service refuses the request, or leaves too large a share of it without a verdict.
        """
        if not items:
            return []
        end = time.monotonic() + self._deadline_s
        chunks = list(_chunks(items))
        troubles = ["no reply in time"]
        executor = ThreadPoolExecutor(CONCURRENT_CHUNKS, thread_name_prefix="verify")
        try:
            futures = [executor.submit(self._verify_chunk, chunk, end, troubles) for chunk in chunks]
            wait(futures, timeout=end - time.monotonic(), return_when=FIRST_EXCEPTION)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
        verdicts: list[Verdict] = []
        for chunk, future in zip(chunks, futures, strict=True):
            answered = future.done() and not future.cancelled()
            verdicts += future.result() if answered else [Verdict.INFRA_ERROR] * len(chunk)
        self._check_share(verdicts, troubles[-1])
        return verdicts

    def _check_share(self, verdicts: Sequence[Verdict], trouble: str) -> None:
        failed = verdicts.count(Verdict.INFRA_ERROR)
        if failed > self._max_infra_error_share * len(verdicts):
            raise RLVRError(
                f"the verifier service at {self._url} left {failed} of {len(verdicts)} responses without a verdict "
                f"within {self._deadline_s:g} s ({trouble}), more than the share of {self._max_infra_error_share:g} "
                "that is tolerated; once the service answers, resume the run with the same command"
            )

    def _verify_chunk(self, chunk: Sequence[_Item], end: float, troubles: list[str]) -> list[Verdict]:
        """Verdicts of one chunk; what goes wrong on the way is noted in ``troubles``."""
        backoff_s = FIRST_BACKOFF_S
        while (left_s := end - time.monotonic()) > 0:
            try:
                reply = self._post(chunk, left_s)
            except httpx.TransportError as error:
                troubles.append(str(error) or type(error).__name__)
            else:
                if reply.status_code < 500:
                    return self._verdicts(reply, len(chunk), troubles)
                troubles.append(f"HTTP {reply.status_code}: {_detail(reply)}")
            time.sleep(max(0.0, min(backoff_s, end - time.monotonic())))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        return [Verdict.INFRA_ERROR] * len(chunk)

    def _post(self, chunk: Sequence[_Item], left_s: float) -> httpx.Response:
        # The service's own deadline is a little earlier, so that its partial answer still arrives.
        body = {
            "items": [
                {"kind": prompt.kind, "response": _encodable(text), "spec": dict(prompt.spec)} for prompt, text in chunk
            ],
            "deadline_s": left_s - min(1.0, 0.1 * left_s),
        }
        return self._http.post("/v1/verify", json=body, timeout=left_s)

    def _verdicts(self, reply: httpx.Response, count: int, troubles: list[str]) -> list[Verdict]:
        if reply.status_code != 200:
            raise RLVRError(f"the verifier service at {self._url} refused the responses: {_detail(reply)}")
        try:
            results = reply.json()["results"]
            verdicts = [Verdict(result["verdict"]) for result in results]
            troubles += [result["detail"] for result in results if result["verdict"] == Verdict.INFRA_ERROR]
        except (ValueError, KeyError, TypeError) as error:
            raise self._stranger(f"{type(error).__name__}: {error}") from error
        if len(verdicts) != count:
            raise self._stranger(f"{len(verdicts)} verdicts for {count} responses")
        return verdicts

    def _stranger(self, trouble: str) -> RLVRError:
        return RLVRError(
            f"what answers at {self._url} is not this version's verifier service ({trouble[:200]}); "
            "check the URL and start it with 'rlvr-sandbox serve'"
        )


def _chunks(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    """Consecutive runs of ``items``, bounded in number and in characters (a single longer response stands alone)."""
    start = chars = 0
    for position, (_, text) in enumerate(items):
        if position > start and (position - start == MAX_CHUNK_ITEMS or chars + len(text) > MAX_CHUNK_CHARS):
            yield items[start:position]
            start, chars = position, 0
        chars += len(text)
    yield items[start:]


def _encodable(text: str) -> str:
    """``text`` with lone surrogates replaced, which UTF-8 cannot carry."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _detail(reply: httpx.Response) -> str:
    """The service's own sentence, or the beginning of whatever else came."""
    try:
        body: Any = reply.json()
    except ValueError:
        body = None
    detail = body.get("detail") if isinstance(body, dict) else None
    return detail if isinstance(detail, str) else reply.text[:200]
