"""Attacks on the next run: what one program leaves for another."""

from __future__ import annotations

from attacks.attack import NORMAL, Attack
from rlvr_sandbox.execution import Limits

_DONE = "\nprint('held')"

ATTACKS = (
    Attack(
        "leave a file",
        """\
open('left', 'w').write('x')
print('held')
""",
        then="attempt(lambda: os.path.exists('left') or os.listdir('.') != ['main.py'])",
    ),
    Attack(
        "leave a file in temporary directories",
        """\
import tempfile
for d in ('/tmp', '/dev/shm', tempfile.gettempdir()):
    try: open(d + '/rlvr-left', 'w')
    except OSError: pass
print('held')
""",
        then="""\
import tempfile
attempt(*[lambda d=d: os.path.exists(d + '/rlvr-left') for d in ('/tmp', '/dev/shm', tempfile.gettempdir())])
""",
    ),
    Attack(
        "patch builtins",
        """\
import builtins
keep = print
builtins.print = lambda *a: None
keep('held')
""",
        then="attempt(lambda: print is not type(print).__call__ and False)",
    ),
    Attack(
        "patch a module",
        """\
import json, math
json.loads = None
math.sqrt = None
print('held')
""",
        then="""\
import math
attempt(lambda: math.sqrt is None)
""",
    ),
    Attack(
        "leave an environment variable",
        """\
os.environ['LEFT'] = '1'
print('held')
""",
        then="attempt(lambda: 'LEFT' in os.environ)",
    ),
    Attack(
        "leave a thread",
        """\
import threading, time
threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
print('held')
""",
        then="""\
import threading
attempt(lambda: threading.active_count() > 1)
""",
    ),
    Attack(
        "leave a signal handler",
        """\
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('held')
""",
        then="""\
import signal
attempt(lambda: signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)
""",
    ),
    Attack(
        "change the random state",
        """\
import random
random.random()
random.seed(99)
print('held')
""",
        then="""\
import random
first = random.random()
random.seed(0)
attempt(lambda: first != random.random())
""",
    ),
    Attack(
        "leave limits",
        """\
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
print('held')
""",
        then="""\
import resource
attempt(lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 8)
""",
    ),
    Attack(
        "find the service's environment",
        """\
known = ('PATH', 'LANG', 'TZ', 'HOME', 'TMPDIR', 'LC_CTYPE', 'PWD')
prefixes = ('PYTHON', 'OMP_', 'OPENBLAS_', 'MKL_')
attempt(lambda: [k for k in os.environ if k not in known and not k.startswith(prefixes)] or False,
        lambda: b'SERVICE_SECRET' in open('/proc/self/environ', 'rb').read())
""",
    ),
    Attack(
        "find the service in memory",
        """\
import gc
kinds = [type(o) for o in gc.get_objects()]
kinds = [k.__name__ for k in kinds if k.__module__.startswith('rlvr_sandbox')]
attempt(lambda: {'Slot', 'SlotExecutor', 'Bait', 'Flight', 'CodeSpec'} & set(kinds) or False)
""",
    ),
    Attack(
        "find descriptors",
        """\
def leaked():
    found = []
    for n in range(3, 1024):
        try: os.fstat(n); found.append(n)
        except OSError: pass
    return found or False
attempt(leaked)
""",
    ),
    Attack(
        "write to its input",
        "attempt(lambda: os.write(0, b'x'), lambda: os.ftruncate(0, 1) or True)",
    ),
    Attack(
        "see another program's input",
        "attempt(lambda: sys.stdin.read() or False)",
        limits=NORMAL,
    ),
    Attack(
        "use several processes to leave one",
        """\
import subprocess
try: subprocess.Popen(['sleep', '30'], start_new_session=True)
except OSError: subprocess.Popen(['sleep', '30'])
print('held')
""",
        limits=Limits(cpu_s=2.0, processes=8),
        then="""\
attempt(lambda: any('sleep' in open(f'/proc/{p}/cmdline').read() for p in os.listdir('/proc') if p.isdigit()) )
""",
    ),
)
