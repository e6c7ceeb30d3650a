"""Attacks on memory, disk, descriptors, threads and output."""

from __future__ import annotations

from attacks.attack import HELD, MEMORY, NORMAL, OUTPUT, SHORT, TIME, Attack, call
from rlvr_sandbox.execution import Ending, Limits

_DISK = Limits(cpu_s=4.0, wall_s=8.0, memory_bytes=256 << 20, disk_bytes=4 << 20)
_FULL = (Ending.EXITED, Ending.OUTPUT_LIMIT)
_TIGHT = Limits(cpu_s=3.0, memory_bytes=128 << 20)

ATTACKS = (
    Attack(
        "hold memory in a list",
        """\
b = []
while True: b.append(bytearray(1 << 20))
""",
        MEMORY,
        _TIGHT,
    ),
    Attack(
        "allocate at once",
        "b = b'x' * (1 << 40)",
        MEMORY,
        _TIGHT,
    ),
    Attack(
        "hold shared memory",
        """\
import mmap
b = [mmap.mmap(-1, 1 << 24) for _ in range(64)]
for m in b: m.write(b'x' * (1 << 24))
""",
        MEMORY,
        _TIGHT,
    ),
    Attack(
        "hold memory in a child's name",
        """\
s = 'x'
while True: s += s
""",
        MEMORY,
        _TIGHT,
    ),
    Attack(
        "unpack a bomb",
        """\
import zlib
b = zlib.compress(bytes(1 << 26))
c = [zlib.decompress(b) for _ in range(40)]
""",
        MEMORY,
        _TIGHT,
    ),
    Attack(
        "recurse without end",
        """\
import sys
sys.setrecursionlimit(10 ** 9)
def f(): f()
f()
""",
        (Ending.SIGNALLED, Ending.MEMORY_LIMIT),
        _TIGHT,
    ),
    Attack(
        "hold stacks",
        """\
import threading, time
threading.stack_size(1 << 28)
try:
    for _ in range(64): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
except RuntimeError:
    print('held')
else:
    print('escaped')
""",
        HELD,
        _TIGHT,
    ),
    Attack(
        "threads without end",
        """\
import threading, time
n = 0
try:
    while n < 2000:
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); n += 1
except RuntimeError:
    pass
print('held' if n < 300 else f'escaped {n}')
""",
    ),
    Attack(
        "descriptors without end",
        """\
n = 0
try:
    while n < 5000: os.dup(0); n += 1
except OSError: pass
print('held' if n < 300 else 'escaped')
""",
    ),
    Attack(
        "fill the disk with one file",
        """\
try:
    with open('big', 'wb') as f:
        for _ in range(64): f.write(b'x' * (1 << 20))
except OSError:
    print('held')
else:
    print('escaped')
""",
        _FULL,
        _DISK,
    ),
    Attack(
        "fill the disk with many files",
        """\
import time
try:
    for n in range(100):
        with open(f'f{n}', 'wb') as f: f.write(b'x' * (1 << 20))
except OSError:
    print('held'); sys.exit()
time.sleep(1)
print('escaped')
""",
        _FULL,
        _DISK,
    ),
    Attack(
        "fill the disk with a sparse file",
        """\
try:
    os.truncate(os.open('s', os.O_CREAT | os.O_WRONLY), 1 << 40)
except OSError:
    print('held')
else:
    print('escaped')
""",
        HELD,
        _DISK,
    ),
    Attack(
        "make files without end",
        """\
import time
try:
    for n in range(30000): os.mkdir(f'd{n}')
except OSError:
    print('held'); sys.exit()
time.sleep(1)
print('escaped')
""",
        _FULL,
        _DISK,
    ),
    Attack(
        "nest directories without end",
        """\
try:
    for n in range(3000):
        os.mkdir('d'); os.chdir('d')
except OSError:
    pass
print('held')
""",
        _FULL,
        NORMAL,
        then="print('held')",
    ),
    Attack(
        "print without end",
        "while True: print('x' * 4096)",
        OUTPUT,
        SHORT,
    ),
    Attack(
        "complain without end",
        "while True: print('x' * 4096, file=sys.stderr)",
        OUTPUT,
        SHORT,
    ),
    Attack(
        "print after closing",
        """\
import time
os.close(0)
while True: os.write(1, b'x' * 65536)
""",
        OUTPUT,
        SHORT,
    ),
    Attack(
        "fill pipes",
        """\
r, w = os.pipe()
os.set_blocking(w, False)
try:
    while True: os.write(w, b'x' * 65536)
except BlockingIOError:
    print('held')
""",
    ),
    call(
        "lock memory",
        """\
attempt(lambda: libc.mlockall(3) == 0, lambda: libc.mlock(ctypes.create_string_buffer(1 << 20), 1 << 20) == 0)
""",
    ),
    Attack(
        "hold memory in JavaScript",
        "let a = []; while (true) a.push(new Array(100000).fill(7));",
        (Ending.MEMORY_LIMIT,),
        Limits(cpu_s=8.0, memory_bytes=256 << 20),
        "javascript",
    ),
    Attack(
        "loop in C++",
        "int main() { for (volatile int i = 0;; ++i) {} }",
        TIME,
        SHORT,
        "cpp",
    ),
    Attack(
        "fork in C++",
        """\
#include <unistd.h>
#include <cstdio>
int main() { puts(fork() < 0 ? "held" : "escaped"); }
""",
        HELD,
        NORMAL,
        "cpp",
    ),
    Attack(
        "compile without end",
        """\
#include "/dev/zero"
int main() {}
""",
        (Ending.COMPILE_ERROR,),
        NORMAL,
        "cpp",
    ),
    Attack(
        "compile a secret into the program",
        """\
#include "/etc/shadow"
int main() {}
""",
        (Ending.COMPILE_ERROR,),
        NORMAL,
        "cpp",
    ),
)
