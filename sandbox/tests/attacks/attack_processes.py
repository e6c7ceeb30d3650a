"""Attacks on processes: starting more, signalling, tracing and outliving others."""

from __future__ import annotations

from attacks.attack import KILLED, SEVERAL, SHORT, TIME, Attack, call
from rlvr_sandbox.execution import Ending

_OTHERS = "others = [p for p in (BAIT['service'], os.getppid(), 1, 2) if p and p != os.getpid()]\n"

ATTACKS = (
    Attack(
        "fork",
        "attempt(os.fork, os.forkpty)",
    ),
    call(
        "vfork, clone and clone3 by number",
        """\
attempt(lambda: raw(58, 220, 17), lambda: raw(56, 220, 17, 0, 0, 0, 0),
        lambda: raw(435, 435, ctypes.create_string_buffer(88), 88))
""",
    ),
    Attack(
        "spawn and execute",
        """\
import subprocess
attempt(lambda: os.posix_spawn('/bin/true', ['true'], {}), lambda: subprocess.run(['true']),
        lambda: os.execv('/bin/echo', ['echo', 'escaped']), lambda: os.system('echo escaped') == 0 or False)
""",
    ),
    call(
        "execute from memory",
        "attempt(lambda: raw(322, 281, 0, ctypes.c_char_p(b''), 0, 0, 0x1000))",
    ),
    Attack(
        "multiprocessing",
        """\
import multiprocessing
attempt(lambda: multiprocessing.Process(target=print).start() or True)
""",
    ),
    Attack(
        "probe other processes",
        """\
others = [p for p in (BAIT['service'], os.getppid(), 1, 2) if p and p != os.getpid()]
attempt(*[lambda p=p: os.kill(p, 0) or True for p in others])
""",
    ),
    Attack(
        "kill other processes",
        """\
others = [p for p in (BAIT['service'], os.getppid(), 1, 2) if p and p != os.getpid()]
attempt(*[lambda p=p: os.kill(p, 9) or True for p in others])
""",
    ),
    Attack(
        "stop the parent",
        """\
others = [p for p in (BAIT['service'], os.getppid(), 1, 2) if p and p != os.getpid()]
attempt(*[lambda p=p: os.kill(p, 19) or True for p in others])
""",
    ),
    Attack(
        "kill everything",
        "attempt(lambda: os.kill(-1, 9) or False)",
        (Ending.EXITED, Ending.SIGNALLED),
        then="print('held')",
    ),
    Attack(
        "kill its process group",
        "attempt(lambda: os.killpg(0, 9) or False)",
        (Ending.EXITED, Ending.SIGNALLED),
        then="print('held')",
    ),
    call(
        "signal threads by number",
        """\
others = [p for p in (BAIT['service'], os.getppid(), 1, 2) if p and p != os.getpid()]
attempt(*[lambda p=p: raw(234, 131, p, p, 9) for p in others], *[lambda p=p: raw(200, 130, p, 9) for p in others])
""",
    ),
    call(
        "trace another process",
        """\
others = [p for p in (BAIT['service'], os.getppid(), 1, 2) if p and p != os.getpid()]
attempt(*[lambda p=p, r=r: raw(101, 117, r, p, 0, 0) for p in others for r in (16, 0x4206)])
""",
    ),
    call(
        "read another process's memory",
        """\
others = [p for p in (BAIT['service'], os.getppid(), 1, 2) if p and p != os.getpid()]
space = (ctypes.c_ulong * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
attempt(*[lambda p=p: raw(310, 270, p, space, 1, space, 1, 0) for p in others],
        *[lambda p=p: open(f'/proc/{p}/mem', 'rb') for p in others])
""",
    ),
    Attack(
        "read about other processes",
        """\
def other():
    pids = {p for p in os.listdir('/proc') if p.isdigit()} - {str(os.getpid())}
    return sorted(pids) or False
attempt(other, lambda: open('/proc/%d/environ' % BAIT['service']).read(),
        lambda: open('/proc/%d/cmdline' % BAIT['service']).read())
""",
    ),
    call(
        "take another process's descriptor",
        """\
others = [p for p in (BAIT['service'], os.getppid(), 1, 2) if p and p != os.getpid()]
def take(p):
    h = raw(434, 434, p, 0)
    return h and raw(438, 438, h[0], 1, 0)
attempt(*[lambda p=p: take(p) for p in others])
""",
    ),
    Attack(
        "change another process's limits and priorities",
        """\
import resource
others = [p for p in (BAIT['service'], os.getppid(), 1, 2) if p and p != os.getpid()]
attempt(*[lambda p=p: resource.prlimit(p, resource.RLIMIT_NOFILE, (9, 9)) for p in others],
        *[lambda p=p: os.setpriority(os.PRIO_PROCESS, p, 19) or True for p in others],
        *[lambda p=p: os.sched_setaffinity(p, {0}) or True for p in others])
""",
    ),
    call(
        "outlive its parent",
        "attempt(lambda: libc.prctl(1, 0, 0, 0, 0) == 0, lambda: libc.prctl(36, 1, 0, 0, 0) == 0)",
    ),
    Attack(
        "raise its limits",
        """\
import resource
attempt(*[lambda k=k: resource.setrlimit(k, (1 << 40, 1 << 40)) or True for k in (
  resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_MEMLOCK)])
""",
    ),
    Attack(
        "leave a daemon behind",
        """\
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import time
        time.sleep(3)
        open(BAIT['directory'] + '/daemon', 'w')
    os._exit(0)
os.wait()
print('held')
""",
        limits=SEVERAL,
        then="attempt(lambda: len([p for p in os.listdir('/proc') if p.isdigit()]) > 1)",
    ),
    Attack(
        "fork without end",
        """\
import time
for _ in range(7):
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
time.sleep(3)
""",
        (Ending.TIME_LIMIT, Ending.SIGNALLED, Ending.MEMORY_LIMIT),
        SEVERAL,
        then="attempt(lambda: len([p for p in os.listdir('/proc') if p.isdigit()]) > 1)",
    ),
    Attack(
        "fork without end in a shell",
        """\
bomb() { if [ $1 -gt 0 ]; then bomb $(($1 - 1)) & bomb $(($1 - 1)) & fi; sleep 3; }; bomb 6; sleep 3
""",
        (Ending.TIME_LIMIT, Ending.SIGNALLED, Ending.EXITED),
        SEVERAL,
        "bash",
        then="attempt(lambda: len([p for p in os.listdir('/proc') if p.isdigit()]) > 1)",
    ),
    Attack(
        "ignore every signal",
        """\
import signal
for number in signal.valid_signals():
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
        TIME,
        SHORT,
    ),
    Attack(
        "stop itself",
        """\
import signal
os.kill(os.getpid(), signal.SIGSTOP)
import time
time.sleep(60)
""",
        TIME,
        SHORT,
    ),
    Attack(
        "kill itself",
        """\
os.kill(os.getpid(), 9)
os.abort()
""",
        KILLED,
    ),
)
