"""Attacks on time: loops, sleeps and waits, wherever a program may hide them."""

from __future__ import annotations

from attacks.attack import SHORT, TIME, Attack

ATTACKS = (
    Attack(
        "loop",
        "while True: pass",
        TIME,
        SHORT,
    ),
    Attack(
        "loop in threads",
        """\
import threading
def f():
    while True: pass
for _ in range(4): threading.Thread(target=f).start()
""",
        TIME,
        SHORT,
    ),
    Attack(
        "sleep",
        """\
import time
time.sleep(1000)
""",
        TIME,
        SHORT,
    ),
    Attack(
        "wait for input that never comes",
        """\
import threading
threading.Lock().acquire() and threading.Event().wait()
""",
        TIME,
        SHORT,
    ),
    Attack(
        "backtrack in a pattern",
        """\
import re
re.match('(a+)+$', 'a' * 40 + 'b')
""",
        TIME,
        SHORT,
    ),
    Attack(
        "tower of powers",
        "x = 9 ** 9 ** 9",
        TIME,
        SHORT,
    ),
    Attack(
        "loop at exit",
        """\
import atexit
def f():
    while True: pass
atexit.register(f)
""",
        TIME,
        SHORT,
    ),
    Attack(
        "loop in a finaliser",
        """\
class A:
    def __del__(self):
        while True: pass
a = A()
del a
""",
        TIME,
        SHORT,
    ),
    Attack(
        "timers without end",
        """\
import signal, time
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 1e-6, 1e-6)
while True: time.sleep(1)
""",
        TIME,
        SHORT,
    ),
)
