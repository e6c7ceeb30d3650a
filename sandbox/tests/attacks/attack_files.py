"""Attacks on files: reading what is not theirs, changing what is not theirs."""

from __future__ import annotations

from attacks.attack import Attack, call

_OPEN = "attempt(lambda: open({path}).read(64))"

ATTACKS = (
    Attack(
        "read the shadow file",
        "attempt(lambda: open('/etc/shadow').read(64))",
    ),
    Attack(
        "read the service's secret file",
        "attempt(lambda: open(BAIT['file']).read(64))",
    ),
    Attack(
        "climb out with dots",
        """\
attempt(lambda: open('../' * 12 + BAIT['file'][1:]).read(), lambda: open('/box/../..' + BAIT['file']).read())
""",
    ),
    Attack(
        "follow a symlink out",
        """\
os.symlink(BAIT['file'], 'link')
attempt(lambda: open('link').read(), lambda: open('link', 'a'))
""",
    ),
    Attack(
        "follow magic links out",
        """\
paths = [f'/proc/{p}/{w}' for p in ('self', '1', str(BAIT['service'])) for w in ('root', 'cwd')]
attempt(*[lambda p=p: open(p + BAIT['file']).read() for p in paths])
""",
    ),
    Attack(
        "link a file of the service into the box",
        "attempt(lambda: os.link(BAIT['file'], 'mine'))",
    ),
    Attack(
        "rename across the wall",
        """\
open('mine', 'w').write('x')
attempt(lambda: os.rename('mine', BAIT['file']), lambda: os.rename(BAIT['file'], 'mine2'))
""",
    ),
    Attack(
        "remove a file of the service",
        "attempt(lambda: os.unlink(BAIT['file']) or True)",
    ),
    Attack(
        "truncate a file of the service",
        """\
attempt(lambda: os.truncate(BAIT['file'], 0) or True, lambda: os.open(BAIT['file'], os.O_RDONLY | os.O_TRUNC))
""",
    ),
    Attack(
        "change a file's mode, times, owner or attributes",
        """\
attempt(lambda: os.chmod(BAIT['file'], 0) or True, lambda: os.utime(BAIT['file'], (0, 0)) or True,
        lambda: os.chown(BAIT['file'], os.getuid(), os.getgid()) or True,
        lambda: os.setxattr(BAIT['file'], 'user.x', b'1') or True)
""",
    ),
    Attack(
        "write into system directories",
        """\
places = ('/', '/usr', '/usr/lib', '/etc', '/bin', '/var/tmp', '/dev', '/proc', '/sys', '/root', '/home', '/run')
attempt(*[lambda p=p: open(p + '/rlvr-attack', 'w') for p in places])
""",
    ),
    Attack(
        "write into the interpreter",
        "attempt(lambda: open(os.path.join(os.path.dirname(os.__file__), 'x.py'), 'w'))",
    ),
    Attack(
        "find the secret by walking everything",
        """\
def walk():
    for n, (top, _, names) in enumerate(os.walk('/')):
        if 'secret.txt' in names and 'rlvr-bait-' in top: return top
        if n > 3000: return False
    return False
attempt(walk)
""",
    ),
    Attack(
        "open devices",
        """\
names = ('mem', 'kmsg', 'port', 'sda', 'vda', 'nvme0n1', 'loop0', 'fuse', 'net/tun', 'kvm', 'ptmx', 'tty')
attempt(*[lambda n=n: open('/dev/' + n, 'rb') for n in names])
""",
    ),
    Attack(
        "make a device",
        """\
import stat
attempt(lambda: os.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0)) or True)
""",
    ),
    Attack(
        "write kernel settings",
        """\
names = ('sysrq-trigger', 'sys/kernel/core_pattern', 'sys/kernel/hostname', 'sys/vm/swappiness', 'self/oom_score_adj')
def write(n):
    with open('/proc/' + n, 'w') as f: f.write('0')
    return n
attempt(*[lambda n=n: write(n) for n in names])
""",
    ),
    Attack(
        "write control groups and sysfs",
        """\
attempt(*[lambda p=p: os.makedirs(p) or True for p in ('/sys/fs/cgroup/x', '/sys/fs/cgroup/pids/x', '/sys/kernel/x')])
""",
    ),
    call(
        "open by handle",
        """\
attempt(lambda: raw(303, 264, -100, ctypes.c_char_p(b'/'), ctypes.create_string_buffer(256),
                    ctypes.byref(ctypes.c_int()), 0), lambda: raw(304, 265, 0, ctypes.create_string_buffer(256), 0))
""",
    ),
    Attack(
        "reach the service's code",
        """\
def find():
    import importlib.util
    return any(n.startswith('rlvr_sandbox') for n in sys.modules) or bool(importlib.util.find_spec('rlvr_sandbox'))
attempt(find)
""",
    ),
    Attack(
        "list the service's directory",
        "attempt(lambda: os.listdir(BAIT['directory']))",
    ),
)
