"""Client of the verifier service: every item gets a verdict by the deadline, whatever the service does."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import httpx

from megatron_rlvr.core import Prompt, RLVRError, Verdict
from megatron_rlvr.verify.board import Board, Chunk
from megatron_rlvr.verify.replicas import Replica, Replicas

MAX_CHUNK_ITEMS = 512
MAX_CHUNK_CHARS = 8 << 20
# Running a program costs as much as checking many answers.
CODE_WEIGHT = 16
CHUNKS_PER_REPLICA = 4
# The service writes an empty line every second where it has nothing to say.
SILENCE_S = 10.0
NDJSON = "application/x-ndjson"

_Item = tuple[Prompt, str]


class VerifierClient:
    """Sends responses to the replicas of the verifier service and returns their verdicts."""

    def __init__(self, url: str, *, deadline_s: float, max_infra_error_share: float) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            url: Base URL of the service, such as ``http://127.0.0.1:8000``; of several replicas, separated by commas.
            deadline_s: Seconds within which one ``verify`` call answers every item.
            max_infra_error_share: Share of a call's items, 0 to 1, that may stay without a verdict.
        """
        urls = [part.rstrip("/") for part in re.split(r"[,\s]+", url) if part]
        if not urls:
            raise RLVRError(f"verify.url is {url!r}, which names no service; give its address or leave the key empty")
        self._replicas = Replicas(urls)
        self._deadline_s = deadline_s
        self._max_infra_error_share = max_infra_error_share

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
        self._replicas.close()

    def verify(self, items: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """One verdict for each (prompt, response text), in order, within the deadline.

        Items travel in chunks and their verdicts are taken as they come. What a lost connection, a refusal for lack of
        room or a failing sandbox leaves open is sent again, to another replica where there is one; so is a chunk that
        makes no progress, while the first sending goes on. Items still open at the deadline are ``INFRA_ERROR``,
        which must never become a reward.

        Raises:
            RLVRError: If the service refuses the request, or leaves too large a share of it without a verdict.
        """
        if not items:
            return []
        chunks = [Chunk(positions) for positions in _chunks(items)]
        board = Board(chunks, len(items), time.monotonic() + self._deadline_s)
        # One more thread than chunks: it is the one that sends a lagging chunk again.
        for _ in range(min(CHUNKS_PER_REPLICA * len(self._replicas), len(chunks) + 1)):
            threading.Thread(target=self._work, args=(board, items), name="verify", daemon=True).start()
        verdicts = board.wait()
        self._check_share(verdicts, board.trouble)
        return verdicts

    def _check_share(self, verdicts: Sequence[Verdict], trouble: str) -> None:
        failed = verdicts.count(Verdict.INFRA_ERROR)
        if failed > self._max_infra_error_share * len(verdicts):
            raise RLVRError(
                f"the verifier service at {self._replicas} left {failed} of {len(verdicts)} responses without a "
                f"verdict within {self._deadline_s:g} s ({trouble}), more than the share of "
                f"{self._max_infra_error_share:g} that is tolerated; once the service answers, resume the run with "
                "the same command"
            )

    def _work(self, board: Board, items: Sequence[_Item]) -> None:
        """What every thread does: send chunks until it is over."""
        while (chunk := board.take()) is not None:
            board.give_back(chunk, self._try(board, chunk, items))

    def _try(self, board: Board, chunk: Chunk, items: Sequence[_Item]) -> str:
        """Send ``chunk`` to the replica that suits best; returns what went wrong, if anything."""
        with self._replicas.pick(chunk.last, board.end, lambda: board.needless(chunk)) as replica:
            if replica is None:
                return ""
            chunk.last = replica
            try:
                return self._send(board, chunk, items, replica)
            except httpx.RequestError as error:
                replica.failed()
                return str(error) or type(error).__name__
            except RLVRError as error:
                board.fail(error)
            except RuntimeError:
                # httpx: the client was closed, as the call that this thread works for is over.
                board.fail(RLVRError("the verifier client was closed while it waited for verdicts; close it later"))
        return ""

    def _send(self, board: Board, chunk: Chunk, items: Sequence[_Item], replica: Replica) -> str:
        """Send what is open of ``chunk`` and take the verdicts; returns what went wrong, if anything."""
        positions = board.open(chunk)
        left_s = board.end - time.monotonic()
        # The service's own deadline is a little earlier, so that its partial answer still arrives.
        body = {
            "items": [_body(*items[position]) for position in positions],
            "deadline_s": max(left_s - min(1.0, 0.1 * left_s), 0.001),
        }
        timeout = httpx.Timeout(left_s, read=min(left_s, SILENCE_S))
        with replica.http.stream("POST", "/v1/verify", json=body, headers={"accept": NDJSON}, timeout=timeout) as reply:
            if reply.status_code >= 500 or reply.status_code == 429:
                reply.read()
                replica.failed(_retry_after(reply))
                return f"HTTP {reply.status_code}: {_detail(reply)}"
            if reply.status_code != 200:
                reply.read()
                raise RLVRError(f"the verifier service at {replica.url} refused the responses: {_detail(reply)}")
            return self._take(board, chunk, positions, replica, reply)

    def _take(
        self, board: Board, chunk: Chunk, positions: Sequence[int], replica: Replica, reply: httpx.Response
    ) -> str:
        """Take verdicts from the stream until every position has one here or elsewhere."""
        if not reply.headers.get("content-type", "").startswith(NDJSON):
            raise _stranger(replica, f"it answers {reply.headers.get('content-type', 'something')!r}")
        seen: set[int] = set()
        for line in reply.iter_lines():
            if line.strip():
                index, verdict, detail = _result(replica, line, len(positions))
                seen.add(index)
                board.settle(chunk, positions[index], verdict, detail)
                replica.answered()
            if board.needless(chunk):
                return ""
        if len(seen) < len(positions):
            replica.failed()
            return f"{len(seen)} verdicts for {len(positions)} responses"
        return ""


def _result(replica: Replica, line: str, count: int) -> tuple[int, Verdict, str]:
    try:
        result = json.loads(line)
        index, verdict, detail = result["index"], Verdict(result["verdict"]), str(result["detail"])
    except (ValueError, KeyError, TypeError) as error:
        raise _stranger(replica, f"{type(error).__name__}: {error}") from error
    if not isinstance(index, int) or not 0 <= index < count:
        raise _stranger(replica, f"a verdict for response {index} of {count}")
    return index, verdict, detail


def _stranger(replica: Replica, trouble: str) -> RLVRError:
    return RLVRError(
        f"what answers at {replica.url} is not this version's verifier service ({trouble[:200]}); "
        "check the URL and start it with 'rlvr-sandbox serve'"
    )


def _chunks(items: Sequence[_Item]) -> Iterator[range]:
    """Consecutive runs of ``items``, bounded in weight and in characters (a single longer response stands alone)."""
    start = chars = weight = 0
    for position, (prompt, text) in enumerate(items):
        item_weight = CODE_WEIGHT if prompt.kind == "code" else 1
        if position > start and (weight + item_weight > MAX_CHUNK_ITEMS or chars + len(text) > MAX_CHUNK_CHARS):
            yield range(start, position)
            start, chars, weight = position, 0, 0
        chars += len(text)
        weight += item_weight
    yield range(start, len(items))


def _body(prompt: Prompt, text: str) -> dict[str, Any]:
    """One item of the request; UTF-8 cannot carry lone surrogates."""
    response = text.encode("utf-8", "replace").decode("utf-8")
    return {"kind": prompt.kind, "response": response, "spec": dict(prompt.spec)}


def _retry_after(reply: httpx.Response) -> float:
    value = reply.headers.get("retry-after", "")
    return min(float(value), 5.0) if value.isdigit() else 0.0


def _detail(reply: httpx.Response) -> str:
    """The service's own sentence, or the beginning of whatever else came."""
    try:
        body: Any = reply.json()
    except ValueError:
        body = None
    detail = body.get("detail") if isinstance(body, dict) else None
    return detail if isinstance(detail, str) else reply.text[:200]
