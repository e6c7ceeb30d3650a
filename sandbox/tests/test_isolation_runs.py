from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from rlvr_sandbox.execution import Ending, Limits, Outcome, Program
from rlvr_sandbox.isolation import choice, open_executor, slot
from rlvr_sandbox.isolation.executor import SlotExecutor
from rlvr_sandbox.isolation.frames import MAX_FRAME, FrameError
from rlvr_sandbox.isolation.selftest import prove
from rlvr_sandbox.verdicts import SandboxError

SHORT = Limits(cpu_s=0.2, wall_s=1.0, memory_bytes=128 << 20)
Body = Callable[[SlotExecutor], Awaitable[None]]


@contextlib.asynccontextmanager
async def executor(backend: str, slots: int = 1) -> AsyncIterator[SlotExecutor]:
    try:
        opened = await open_executor(backend, slots=slots, unsafe=backend == "none")
    except SandboxError as error:
        pytest.skip(f"this machine has no {backend}: {error}")
    try:
        yield opened
    finally:
        await opened.close()


def on(backend: str, body: Body, slots: int = 1) -> None:
    async def run() -> None:
        async with executor(backend, slots) as opened:
            await body(opened)

    asyncio.run(run())


def python(source: str) -> Program:
    return Program("python", source)


PROGRAMS: list[tuple[str, bytes, Ending, int | None, bytes]] = [
    ("print(input())", b"7\n", Ending.EXITED, 0, b"7\n"),
    ("import sys; print(open('/dev/stdin').read())", b"7", Ending.EXITED, 0, b"7\n"),
    ("raise SystemExit(3)", b"", Ending.EXITED, 3, b""),
    ("raise SystemExit('why')", b"", Ending.EXITED, 1, b""),
    ("1 / 0", b"", Ending.EXITED, 1, b""),
    ("def f(:", b"", Ending.EXITED, 1, b""),
    ("x = '\\0'\nprint(len(x))", b"", Ending.EXITED, 0, b"1\n"),
    ("import atexit; atexit.register(print, 'later'); print('now')", b"", Ending.EXITED, 0, b"now\nlater\n"),
    ("import threading; threading.Thread(target=print, args=('t',)).start()", b"", Ending.EXITED, 0, b"t\n"),
    ("print(__name__, __file__.endswith('main.py'))", b"", Ending.EXITED, 0, b"__main__ True\n"),
    ("import asyncio\nasync def f(): print('a')\nasyncio.run(f())", b"", Ending.EXITED, 0, b"a\n"),
    ("import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))\nprint(1)", b"", Ending.EXITED, 0, b"1\n"),
    ("import os; os.write(1, b'\\xff\\x00')", b"", Ending.EXITED, 0, b"\xff\x00"),
    ("import os; os._exit(0)", b"", Ending.EXITED, 0, b""),
    ("while True: pass", b"", Ending.TIME_LIMIT, None, b""),
    ("import time; time.sleep(60)", b"", Ending.TIME_LIMIT, None, b""),
    ("import ctypes; ctypes.string_at(0)", b"", Ending.SIGNALLED, None, b""),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["ns", "none", "bwrap"])
def test_programs_run_as_scripts_do(backend: str) -> None:
    async def body(opened: SlotExecutor) -> None:
        for source, stdin, ending, status, stdout in PROGRAMS:
            outcome = await opened.run(python(source), SHORT, stdin)
            assert (outcome.ending, outcome.exit_status, outcome.stdout) == (ending, status, stdout), (source, outcome)

    on(backend, body)


def test_tracebacks_show_the_program_and_nothing_else() -> None:
    async def body(opened: SlotExecutor) -> None:
        outcome = await opened.run(python("def f():\n    return {}['key']\nf()"), SHORT)
        assert b"return {}['key']" in outcome.stderr
        assert b"rlvr_sandbox" not in outcome.stderr

    on("ns", body)


def test_files_lie_beside_the_program() -> None:
    async def body(opened: SlotExecutor) -> None:
        program = Program("python", "print(open('data/in.txt').read())", {"data/in.txt": b"content"})
        assert (await opened.run(program, SHORT)).stdout == b"content\n"

    on("ns", body)


def test_rewards_do_not_depend_on_chance() -> None:
    async def body(opened: SlotExecutor) -> None:
        source = "import random\nprint(random.random(), hash('x'), set('hello world'))"
        outcomes = [await opened.run(python(source), SHORT) for _ in range(3)]
        assert len({outcome.stdout for outcome in outcomes}) == 1

    on("ns", body)


def test_cpu_time_of_all_processes_counts() -> None:
    async def body(opened: SlotExecutor) -> None:
        source = "import os\nfor _ in range(3): os.fork()\nwhile True: pass"
        started = time.monotonic()
        outcome = await opened.run(python(source), Limits(cpu_s=0.5, wall_s=20.0, processes=16))
        assert outcome.ending is Ending.TIME_LIMIT
        assert 0.5 <= outcome.cpu_s < 1.5
        assert time.monotonic() - started < 15

    on("ns", body)


def test_output_is_kept_up_to_the_limit() -> None:
    async def body(opened: SlotExecutor) -> None:
        exact = await opened.run(python("print('x' * 999)"), Limits(output_bytes=1000))
        assert (exact.ending, len(exact.stdout)) == (Ending.EXITED, 1000)
        over = await opened.run(python("print('x' * 1000)"), Limits(output_bytes=1000))
        assert (over.ending, len(over.stdout)) == (Ending.OUTPUT_LIMIT, 1000)
        large = await opened.run(python("print('x' * (1 << 22))"), Limits(output_bytes=1 << 23))
        assert (large.ending, len(large.stdout)) == (Ending.EXITED, (1 << 22) + 1)

    on("ns", body)


def test_sessions_answer_frames_of_any_size() -> None:
    async def body(opened: SlotExecutor) -> None:
        async with opened.open(python("print('up')"), Limits(), "echo") as session:
            for frame in (b"", b"x", b"\0" * 70_000, os.urandom(1 << 20), b"m" * MAX_FRAME):
                assert await session.call(frame) == frame
            with pytest.raises(FrameError):
                await session.call(b"m" * (MAX_FRAME + 1))
            outcome = await session.finish()
        assert (outcome.ending, outcome.stdout) == (Ending.EXITED, b"up\n")

    on("ns", body)


@pytest.mark.parametrize(
    ("source", "ending"),
    [
        ("while True: pass", Ending.TIME_LIMIT),
        ("import time; time.sleep(60)", Ending.TIME_LIMIT),
        ("import os; os._exit(0)", Ending.EXITED),
        ("raise ValueError", Ending.EXITED),
        ("import os; [os.write(int(n), b'\\xff' * 64) for n in os.listdir('/proc/self/fd')[3:4]]", Ending.EXITED),
    ],
)  # fmt: skip
def test_a_session_with_a_bad_program_ends_in_words(source: str, ending: Ending) -> None:
    async def body(opened: SlotExecutor) -> None:
        async with opened.open(python(source), SHORT, "echo") as session:
            assert await session.call(b"x") is None
            assert await session.call(b"x") is None
            assert (await session.finish()).ending is ending
        assert (await opened.run(python("print(1)"), SHORT)).stdout == b"1\n"

    on("ns", body)


def test_a_judgement_gets_its_second_session_even_where_there_is_one_slot() -> None:
    async def body(opened: SlotExecutor) -> None:
        async with (
            opened.open(python(""), Limits(), "echo") as first,
            opened.open(python(""), Limits(), "echo") as second,
        ):
            assert await first.call(b"a") == b"a"
            assert await second.call(b"b") == b"b"

    on("ns", body)


def test_an_abandoned_run_is_killed_and_its_slot_serves_on() -> None:
    async def body(opened: SlotExecutor) -> None:
        task = asyncio.create_task(opened.run(python("import time; time.sleep(60)"), Limits()))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(3):
            assert (await opened.run(python("print(1)"), SHORT)).stdout == b"1\n"
        assert opened.restarts == 0

    on("ns", body)


async def _during(opened: SlotExecutor, act: Callable[[slot.Slot], None]) -> Outcome:
    """The outcome of a run during which ``act`` befalls its slot."""
    task = asyncio.create_task(opened.run(python("import time; time.sleep(0.8); print('done')"), Limits()))
    await asyncio.sleep(0.3)
    for living in list(opened._living):
        act(living)
    async with asyncio.timeout(8):
        return await task


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("which", [0, 1])
def test_a_run_survives_the_loss_of_its_zygote(number: signal.Signals, which: int) -> None:
    async def body(opened: SlotExecutor) -> None:
        started = time.monotonic()
        outcome = await _during(opened, lambda living: os.kill(living.pids[which], number))
        assert (outcome.ending, outcome.stdout) == (Ending.EXITED, b"done\n")
        assert opened.restarts == 1
        assert time.monotonic() - started < 5

    on("ns", body)


def test_an_idle_zygote_that_stops_is_replaced_within_three_seconds() -> None:
    async def body(opened: SlotExecutor) -> None:
        (before,) = opened._living
        os.kill(before.pids[0], signal.SIGSTOP)
        await asyncio.sleep(2.5)
        assert opened.restarts == 1
        async with asyncio.timeout(0.5):
            assert (await opened.run(python("print(1)"), SHORT)).stdout == b"1\n"

    on("ns", body)


def test_a_run_that_loses_two_zygotes_is_an_infra_error() -> None:
    async def body(opened: SlotExecutor) -> None:
        async def hunt() -> None:
            while True:
                for living in list(opened._living):
                    if living.busy:
                        living.fail("the test killed it")
                await asyncio.sleep(0.05)

        hunter = asyncio.create_task(hunt())
        outcome = await opened.run(python("import time; time.sleep(5)"), Limits())
        hunter.cancel()
        assert outcome.ending is Ending.INFRA_ERROR
        assert "two sandbox slots broke" in outcome.detail

    on("ns", body)


def test_a_session_that_loses_its_zygote_is_an_infra_error() -> None:
    async def body(opened: SlotExecutor) -> None:
        async with opened.open(python(""), Limits(), "echo") as session:
            assert await session.call(b"x") == b"x"
            (living,) = opened._living
            os.kill(living.pids[0], signal.SIGKILL)
            await asyncio.sleep(0.5)
            assert await session.call(b"x") is None
            assert (await session.finish()).ending is Ending.INFRA_ERROR

    on("ns", body)


def test_zygotes_are_recycled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(opened: SlotExecutor) -> None:
        monkeypatch.setattr(slot, "RUNS_PER_ZYGOTE", 0)
        for _ in range(2):
            assert (await opened.run(python("print(1)"), SHORT)).stdout == b"1\n"
        assert opened.restarts >= 1

    on("ns", body)


def _children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize("backend", ["ns", "none"])
def test_nothing_is_left_behind(backend: str) -> None:
    children, descriptors = _children(), len(os.listdir("/proc/self/fd"))
    mounts = Path("/proc/self/mounts").read_text()

    async def body(opened: SlotExecutor) -> None:
        for _ in range(20):
            await opened.run(python("open('x', 'w').write('y')"), SHORT)
        async with opened.open(python(""), Limits(), "echo") as session:
            await session.call(b"x")

    on(backend, body, slots=2)
    assert _children() == children
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert Path("/proc/self/mounts").read_text() == mounts
    assert not [
        name for where in ("/tmp", "/dev/shm") for name in os.listdir(where) if f"rlvr-sandbox-{os.getpid()}-" in name
    ]


def test_what_a_killed_service_left_is_swept_by_the_next_one() -> None:
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    left = Path(choice._fast_directory()) / f"rlvr-sandbox-{dead}-abc"
    (left / "0" / "deep" / "er").mkdir(parents=True)

    async def body(opened: SlotExecutor) -> None:
        assert not left.exists()

    on("none", body)


FORKER = """
import os, random, threading
random.seed(1)
taker, giver = os.pipe()
if os.fork() == 0:
    os.write(giver, str(random.random()).encode())
    os._exit(0)
os.wait()
print(float(os.read(taker, 64)) != random.random(), threading.main_thread().is_alive())
"""


def test_modules_hear_of_the_forks_of_programs() -> None:
    """The zygote spares its runs what modules do after forks; a program that forks itself has it done."""

    async def body(opened: SlotExecutor) -> None:
        assert (await opened.run(python(FORKER), Limits(processes=4))).stdout == b"True True\n"

    on("ns", body)


def test_no_isolation_needs_the_unsafe_flag() -> None:
    with pytest.raises(SandboxError, match="unsafe=True"):
        asyncio.run(open_executor("none"))


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(SandboxError, match="'docker' is unknown"):
        asyncio.run(open_executor("docker"))


def test_the_self_test_finds_that_no_isolation_isolates_nothing(tmp_path: Path) -> None:
    async def body(opened: SlotExecutor) -> None:
        with pytest.raises(SandboxError, match="read the machine's files") as caught:
            await prove(opened, str(tmp_path))
        for attack in ("reach the network", "start a process", "execute a program", "signal other processes"):
            assert attack in str(caught.value)

    on("none", body)


def test_auto_names_every_reason_and_never_falls_back_to_no_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    async def refuse(backend: str, slots: int, numpy: bool) -> SlotExecutor:
        tried.append(backend)
        raise SandboxError(f"{backend} is broken")

    monkeypatch.setattr(choice, "_open", refuse)
    with pytest.raises(SandboxError, match=r"ns is broken.*landlock is broken.*bwrap is broken"):
        asyncio.run(open_executor("auto", unsafe=True))
    assert tried == ["ns", "landlock", "bwrap"]
