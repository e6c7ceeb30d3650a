"""What the service and a slot's zygote say to each other: orders with file descriptors, one report for each."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass

MAX_MESSAGE = 1 << 16
KILL = b"kill"
CLOCK = b"clock"
WARM = b"warm"


@dataclass(frozen=True, slots=True)
class Order:
    """One run, as the zygote hears of it; the contents travel as descriptors.

    Descriptors, in order: payload (all files, one after the other), stdin, stdout, stderr, for a guest the channel;
    where there is a cgroup then what the run joins it by, and at last what tells of kills in it.

    Attributes:
        files: Name, bytes and mode of each file in the payload; the first is the program.
        argv: The command to execute; empty runs the first file in the warm interpreter.
        guest: The guest module that gets the program's text and the channel; empty runs the program itself.
        env: What to add to the environment.
        cpu_s: CPU seconds of all processes together.
        memory_bytes: Memory of all processes together.
        disk_bytes: Bytes in the private directory.
        processes: Processes and threads at once; 1 forbids new processes but not threads.
        address_space: Whether the address space may be bounded; some runtimes reserve far more than they use.
    """

    files: list[tuple[str, int, int]]
    argv: list[str]
    guest: str
    env: dict[str, str]
    cpu_s: float
    memory_bytes: int
    disk_bytes: int
    processes: int
    address_space: bool

    @property
    def plumbing(self) -> int:
        """How many descriptors are not those of a cgroup."""
        return 5 if self.guest else 4

    def encode(self) -> bytes:
        """The order as one message."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, message: bytes) -> Order:
        """The order in ``message``."""
        fields = json.loads(message)
        fields["files"] = [(name, size, mode) for name, size, mode in fields["files"]]
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Report:
    """What the zygote saw of a run.

    Attributes:
        status: The wait status.
        cpu_s: CPU seconds of all its processes.
        wall_s: Wall seconds from fork to end.
        peak_bytes: Largest resident size of one of its processes.
        why: ``cpu``, ``memory``, ``disk``, ``processes`` or ``killed`` where the zygote ended it, else empty.
        fault: Why the run could not start; empty where it did.
    """

    status: int
    cpu_s: float
    wall_s: float
    peak_bytes: int
    why: str
    fault: str

    def encode(self) -> bytes:
        """The report as one message."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True, slots=True)
class Clock:
    """What a running program has used: CPU seconds, and seconds it was ready but waited for a processor."""

    cpu_s: float
    waiting_s: float

    def encode(self) -> bytes:
        """The clock as one message."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True, slots=True)
class Leader:
    """The leader of a run's process group, told where killing the zygote does not kill the group."""

    leader: int

    def encode(self) -> bytes:
        """The leader as one message."""
        return json.dumps(asdict(self)).encode()


def decode_answer(message: bytes) -> Report | Clock | Leader:
    """What a zygote says: a leader, a clock where one was asked for, then a report."""
    fields = json.loads(message)
    if "leader" in fields:
        return Leader(**fields)
    return Report(**fields) if "status" in fields else Clock(**fields)


def receive_order(control: socket.socket) -> tuple[Order, list[int]] | None:
    """Wait for an order and its descriptors; ``None`` once the service has closed the socket."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE, 8)
        if not message:
            return None
        if message in (KILL, CLOCK):  # It was meant for a run that ended meanwhile.
            continue
        return Order.decode(message), list(descriptors)
