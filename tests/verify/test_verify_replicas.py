"""Several replicas: one that is down is left alone, one that lags is overtaken."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

from verify_stub import Reply, accepted, countdown, results, stub

from megatron_rlvr.core import Verdict
from megatron_rlvr.verify import VerifierClient
from megatron_rlvr.verify.client import MAX_CHUNK_ITEMS


def test_a_replica_that_is_down_is_left_alone() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        requests: list[int] = []

        def answer(number: int, body: dict[str, Any]) -> Reply:
            requests.append(number)
            return accepted(len(body["items"]))

        with stub(answer) as up, VerifierClient(f"{down}, {up}", deadline_s=10, max_infra_error_share=0) as client:
            started = time.monotonic()
            assert client.verify([countdown("1")] * 4 * MAX_CHUNK_ITEMS) == [Verdict.ACCEPTED] * 4 * MAX_CHUNK_ITEMS
            assert time.monotonic() - started < 5
        assert len(requests) == 4


def test_a_lagging_chunk_is_sent_to_another_replica_and_the_first_answer_wins() -> None:
    late = threading.Event()

    def slow(number: int, body: dict[str, Any]) -> Reply:
        late.wait(10)
        return results(*["wrong_answer"] * len(body["items"]))

    with stub(slow) as lagging, stub(lambda number, body: accepted(len(body["items"]))) as quick:
        for urls in (f"{lagging},{quick}", f"{quick},{lagging}"):
            with VerifierClient(urls, deadline_s=8, max_infra_error_share=0) as client:
                started = time.monotonic()
                assert client.verify([countdown("1")] * 6 * MAX_CHUNK_ITEMS) == [Verdict.ACCEPTED] * 6 * MAX_CHUNK_ITEMS
                assert time.monotonic() - started < 4
        late.set()
