"""The guest that runs tests and program in one process, for suites that need it. What it says can be forged.

The first frame is ``["load"]``, answered by ``["value", None]`` or ``["raised", type, message]``; the second one is
``[nonce, entry_point, test_code]``, answered by ``[nonce, status, detail]``. The nonce arrives only after the program's
module level has run, so forging takes more than printing something at import.
"""

from __future__ import annotations

import socket
import threading
from typing import Any

from rlvr_sandbox.guest import suite
from rlvr_sandbox.guest.codec import decode, encode
from rlvr_sandbox.guest.solution import describe, find, load
from rlvr_sandbox.isolation.frames import receive_frame, send_frame


def main(source: str, channel: socket.socket) -> None:
    """Load ``source``, then run the test code of the second frame in its namespace."""
    if receive_frame(channel) is None:
        return
    try:
        module = load(source)
    except BaseException as error:  # noqa: BLE001 - SystemExit of the program is its answer, not our end
        send_frame(channel, encode(["raised", *describe(error)]))
        return
    send_frame(channel, encode(["value", None]))
    frame = receive_frame(channel)
    if frame is None:
        return
    request: Any = decode(frame)
    nonce, entry_point, test_code = request
    report = _report(module.__dict__, find(module, entry_point) if entry_point else None, test_code)
    send_frame(channel, encode([nonce, report.status, report.detail]))


def _report(namespace: dict[str, Any], candidate: object, test_code: str) -> suite.Report:
    # A thread that the program left could patch what the tests use while they run.
    if threading.active_count() > 1:
        return suite.Report(suite.FAILED, "the program leaves threads running after it is loaded")
    namespace["candidate"] = candidate
    return suite.run(test_code, namespace, candidate)
