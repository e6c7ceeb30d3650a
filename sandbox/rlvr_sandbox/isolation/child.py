"""The life of one run, from fork to its end: plumbing, walls, then the program in the warm interpreter or by exec."""

from __future__ import annotations

import atexit
import os
import random
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable, Mapping
from typing import NoReturn, Protocol

from rlvr_sandbox.isolation import cgroups, forks
from rlvr_sandbox.isolation.messages import Order

STARTED = b"started"
NOT_EXECUTED = 127
_OUTPUT_LOST = 120

Guest = Callable[[str, socket.socket], None]

# In a run every page that is written to costs a copy: names are looked for before, and no module is torn down.
_ours: list[str] = []
_hidden: list[types.ModuleType] = []


class Walls(Protocol):
    """What a backend puts between a program and everything else.

    Attributes:
        leaky: Whether a run's processes outlive its leader and the zygote unless somebody kills them.
    """

    leaky: bool

    def before_fork(self) -> None:
        """In the zygote, before each run."""

    def after_fork(self, pid: int) -> None:
        """In the zygote, right after each fork of a run ``pid``."""

    def workspace(self, order: Order) -> str:
        """In the run: make its private directory and say where it is."""

    def confine(self, order: Order) -> None:
        """In the run: give up all that it must not have. The last step before the program."""

    def processes(self, pid: int) -> list[int]:
        """In the zygote: the processes of the run that ``pid`` leads, as far as they live."""

    def disk_bytes(self) -> int:
        """In the zygote: the bytes in the run's directory where no file system bounds them, else 0."""

    def clean(self, leader: int) -> None:
        """In the zygote: remove what the run left; its leader, also that of its process group, is dead."""


def prepare() -> None:
    """In the zygote, once all is imported: find what programs shall not."""
    _ours.extend(name for name in sys.modules if name.partition(".")[0] == "rlvr_sandbox")


def live(
    order: Order, descriptors: list[int], ready: int, walls: Walls, guests: Mapping[str, Guest], path: list[str]
) -> NoReturn:
    """Be the run of ``order``; never returns.

    Args:
        order: What to run.
        descriptors: As ``Order`` lists them.
        ready: Where to write ``STARTED`` once the walls stand, or what kept them from standing.
        walls: The backend's walls.
        guests: The guests' entry points by name.
        path: Where the program may import from, besides its own directory.
    """
    try:
        cgroups.join(descriptors[order.plumbing : -1])
        if order.processes > 1:
            forks.restore()
        # Without a session of its own it could signal its zygote by process group.
        os.setsid()
        source = _settle(order, descriptors, ready, walls)
        walls.confine(order)
        os.write(ready, STARTED)
        os.close(ready)
    except BaseException as error:  # noqa: BLE001 - this process must never get back into the zygote's own work
        os.write(ready, f"{type(error).__name__}: {error}".encode()[:400])
        os._exit(NOT_EXECUTED)
    if order.argv:
        _execute(order)
    if order.guest:
        main, channel = guests[order.guest], socket.socket(fileno=descriptors[4])
        _finish(lambda: main(source.decode(), channel), path)
    _finish(lambda: _run(source, order.files[0][0]), path)


def _settle(order: Order, descriptors: list[int], ready: int, walls: Walls) -> bytes:
    """Lay out the files, put the descriptors where a program expects them; returns the program's text."""
    payload = descriptors[0]
    place = walls.workspace(order)
    os.chdir(place)
    source = b""
    for index, (name, size, mode) in enumerate(order.files):
        content = os.read(payload, size)
        if index == 0:
            source = content
        if os.path.dirname(name):
            os.makedirs(os.path.dirname(name), exist_ok=True)
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        os.write(file, content)
        os.close(file)
    for number in range(3):
        os.dup2(descriptors[1 + number], number)
    kept = sorted([ready, descriptors[4]] if order.guest else [ready])
    start = 3
    for descriptor in kept:
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, 1 << 20)
    return source


def _execute(order: Order) -> NoReturn:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvpe(order.argv[0], order.argv, {**os.environ, **order.env})
    except OSError as error:
        os.write(2, f"{order.argv[0]}: {error.strerror}\n".encode())
        os._exit(NOT_EXECUTED)


def _run(source: bytes, name: str) -> None:
    """Run ``source`` as Python runs a script."""
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=os.path.abspath(name), __builtins__=__builtins__)
    sys.modules["__main__"] = module
    exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)


def _finish(body: Callable[[], None], path: list[str]) -> NoReturn:
    """Run ``body`` in a clean interpreter and end the process as the interpreter ends."""
    _hidden.extend(map(sys.modules.pop, _ours))
    sys.path[:] = [os.getcwd(), *path]
    sys.argv = ["main.py"]
    random.seed(0)
    status = _status_of(body)
    status = _status_of(threading._shutdown) or status  # type: ignore[attr-defined]
    status = _status_of(atexit._run_exitfuncs) or status
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            status = status or _OUTPUT_LOST
    os._exit(status)


def _status_of(body: Callable[[], None]) -> int:
    """The exit status that ``body`` earns; what it raises is printed as the interpreter prints it."""
    try:
        body()
    except SystemExit as end:
        if end.code is None:
            return 0
        if isinstance(end.code, int):
            return end.code & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001 - the boundary of the program's process
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 1
    return 0
