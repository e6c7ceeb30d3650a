"""The canary attacks of the self-test: each prints ``held`` where the walls stand, or must end as stated."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlvr_sandbox.execution import Ending, Limits


@dataclass(frozen=True, slots=True)
class Canary:
    """One small harmless program.

    Attributes:
        name: What it attempts.
        source: What follows the bait's preamble.
        endings: How its run may end; where that is ``EXITED`` it must also print ``held``.
        limits: Under which limits.
    """

    name: str
    source: str
    endings: tuple[Ending, ...] = (Ending.EXITED,)
    limits: Limits = field(default_factory=lambda: Limits(cpu_s=2.0, memory_bytes=256 << 20))


_SMALL = Limits(cpu_s=0.1, wall_s=1.0, memory_bytes=128 << 20, output_bytes=1 << 14, disk_bytes=1 << 20)

CANARIES = (
    Canary("run at all and import", "import wave, sqlite3, colorsys\nprint('held')"),
    Canary("use more CPU time than its limit", "while True: pass", (Ending.TIME_LIMIT,), _SMALL),
    Canary("sleep for ever", "import time\ntime.sleep(100)", (Ending.TIME_LIMIT,), _SMALL),
    Canary("use more memory than its limit", "b = [bytearray(1 << 20) for _ in range(1024)]", (Ending.MEMORY_LIMIT,)),
    Canary("print without end", "while True: print('x' * 1000)", (Ending.OUTPUT_LIMIT,), _SMALL),
    Canary(
        "read the machine's files",
        "paths = (BAIT['file'], '/etc/shadow', '/etc/hostname', '/etc/hosts')\n"
        "attempt(*[lambda p=p: open(p).read() for p in paths])",
    ),
    Canary(
        "write outside its directory",
        "places = (BAIT['directory'], '/usr', '/', '/etc', '/var/tmp')\n"
        "attempt(*[lambda p=p: open(p + '/x-rlvr', 'w') for p in places],\n"
        "        lambda: open(BAIT['file'], 'a'), lambda: os.chmod(BAIT['file'], 0o600),\n"
        "        lambda: os.truncate(BAIT['file'], 0))",
    ),
    Canary(
        "see the service's environment",
        "known = {'PATH', 'LANG', 'TZ', 'HOME', 'TMPDIR', 'LC_CTYPE', 'PWD'}\n"
        "prefixes = ('PYTHON', 'OMP_', 'OPENBLAS_', 'MKL_')\n"
        "rest = [k for k in os.environ if k not in known and not k.startswith(prefixes)]\n"
        "attempt(lambda: rest or False)",
    ),
    Canary(
        "see other processes",
        "def others():\n"
        "    pids = {p for p in os.listdir('/proc') if p.isdigit()} - {str(os.getpid())}\n"
        "    return [open(f'/proc/{p}/cmdline').read() for p in pids] or False\n"
        "attempt(others, lambda: open('/proc/%d/environ' % BAIT['service']).read(),\n"
        "        lambda: open('/proc/%d/mem' % os.getppid(), 'rb'))",
    ),
    Canary(
        "reach the network and the service's sockets",
        "import socket\n"
        "def reach(family, address):\n"
        "    s = socket.socket(family); s.settimeout(0.5); s.connect(address); return address\n"
        "attempt(lambda: reach(socket.AF_INET, ('127.0.0.1', BAIT['port'])),\n"
        "        lambda: reach(socket.AF_UNIX, BAIT['unix']),\n"
        "        lambda: reach(socket.AF_UNIX, chr(0) + BAIT['abstract']))",
    ),
    Canary("start a process", "attempt(os.fork, lambda: os.posix_spawn('/bin/true', ['true'], {}))"),
    Canary("execute a program", "attempt(lambda: os.execv('/bin/echo', ['echo', 'escaped']))"),
    Canary(
        "signal other processes",
        "me = os.getpid()\n"
        "attempt(*[lambda p=p: os.kill(p, 0) for p in (BAIT['service'], os.getppid() or 2, -1) if p != me])",
    ),
    Canary(
        "make system calls that open the kernel wider",
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(name, *arguments):\n"
        "    return getattr(libc, name)(*arguments) >= 0 or False\n"
        "attempt(lambda: call('unshare', 0x10000000), lambda: call('ptrace', 16, BAIT['service'], 0, 0),\n"
        "        lambda: call('mount', b'none', b'/', b'tmpfs', 0, None), lambda: call('setuid', 0),\n"
        "        lambda: call('memfd_create', b'x', 0), lambda: call('shmget', 1, 4096, 0o1600),\n"
        "        lambda: call('socket', 16, 3, 0))",
    ),
    Canary(
        "find descriptors of the service",
        "def leaked():\n"
        "    found = []\n"
        "    for number in range(3, 256):\n"
        "        try:\n"
        "            os.fstat(number); found.append(number)\n"
        "        except OSError:\n"
        "            pass\n"
        "    return found or False\n"
        "attempt(leaked)",
    ),
    Canary(
        "leave something for the next run",
        "import builtins, math\n"
        "before = hasattr(math, 'mark') or os.path.exists('mark')\n"
        "math.mark = 1\nopen('mark', 'w').close()\nattempt(lambda: before)",
    ),
    Canary(
        "fill the disk",
        "blob = b'x' * (1 << 18)\n"
        "try:\n"
        "    for n in range(512):\n"
        "        with open(str(n), 'wb') as f: f.write(blob)\n"
        "except OSError:\n"
        "    print('held'); sys.exit(0)\n"
        "import time\ntime.sleep(0.3)\nprint('escaped')",
        (Ending.EXITED, Ending.OUTPUT_LIMIT),
        Limits(cpu_s=2.0, memory_bytes=256 << 20, disk_bytes=4 << 20),
    ),
)

AFTERWARDS = Canary(
    "find what an earlier run left",
    "import math\nattempt(lambda: hasattr(math, 'mark') or os.path.exists('mark'))",
)
