"""The guest of the tests: runs them against a program that runs in another sandbox, and says the verdict.

No candidate code ever runs in this process. The first frame is ``[nonce, entry_point, inplace, objects]``. Each frame
it sends is either ``R`` and a request for the program, answered by the program's reply, or ``V`` and
``[nonce, status, detail, requests]``, after which the channel ends.
"""

from __future__ import annotations

import socket
import sys
import types
from typing import Any

from rlvr_sandbox.guest import suite
from rlvr_sandbox.guest.codec import decode, encode
from rlvr_sandbox.guest.remote import BrokenTests, Handle, Remote
from rlvr_sandbox.guest.solution import MODULE
from rlvr_sandbox.isolation.frames import receive_frame, send_frame

VERDICT = b"V"


def main(source: str, channel: socket.socket) -> None:
    """Run the test code ``source`` and send its verdict."""
    frame = receive_frame(channel)
    if frame is None:
        return
    start: Any = decode(frame)
    nonce, entry_point, inplace, objects = start
    remote = Remote(channel, inplace, objects)
    report = _report(source, entry_point, remote)
    send_frame(channel, VERDICT + encode([nonce, report.status, report.detail, remote.requests]))


def _report(source: str, entry_point: str, remote: Remote) -> suite.Report:
    try:
        candidate = remote.ask("find", entry_point)
    except BrokenTests as error:
        return suite.Report(suite.BROKEN, str(error))
    except Exception as error:  # noqa: BLE001 - whatever the program raised while it was looked up
        return suite.Report(suite.FAILED, f"no {entry_point} in the program: {error}"[:200])
    if not isinstance(candidate, Handle):
        return suite.Report(suite.FAILED, f"{entry_point} is data, not a function or class")
    before = remote.requests
    sys.modules[MODULE] = _Program(remote)
    namespace = {"__name__": "tests", "candidate": candidate, entry_point.rpartition(".")[2]: candidate}
    report = suite.run(source, namespace, candidate)
    if remote.fault:
        return suite.Report(suite.BROKEN, remote.fault[:200])
    if remote.requests > before:
        return report
    if report.status == suite.FAILED:
        return suite.Report(suite.BROKEN, f"test_code fails before it calls the program: {report.detail}"[:200])
    return suite.Report(suite.BROKEN, report.detail or "test_code never calls the program, so it proves nothing")


class _Program(types.ModuleType):
    """``from solution import f`` in test code: every name is the program's."""

    def __init__(self, remote: Remote) -> None:
        super().__init__(MODULE)
        self.__dict__["_remote"] = remote

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__["_remote"].ask("find", name)
