"""Attacks on the kernel's wider doors: namespaces, capabilities, modules, tracing, other system call tables."""

from __future__ import annotations

from attacks.attack import Attack, call
from rlvr_sandbox.execution import Ending

_NS = "for_flags = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x80)\n"

ATTACKS = (
    call(
        "new namespaces",
        """\
for_flags = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x80)
attempt(*[lambda f=f: raw(272, 97, f) for f in for_flags])
""",
    ),
    call(
        "new namespaces by clone",
        """\
for_flags = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x80)
attempt(*[lambda f=f: raw(56, 220, f | 17, 0, 0, 0, 0) for f in for_flags],
        *[lambda f=f: raw(56, 220, f | 0x10000 | 0x800 | 0x100, 0, 0, 0, 0) for f in for_flags if f > 0x80])
""",
    ),
    call(
        "enter namespaces",
        """\
def enter(kind):
    fd = os.open(f'/proc/{BAIT["service"]}/ns/{kind}', os.O_RDONLY)
    return raw(308, 268, fd, 0)
attempt(*[lambda k=k: enter(k) for k in ('mnt', 'net', 'pid', 'user')], lambda: raw(308, 268, 0, 0))
""",
    ),
    call(
        "mount and unmount",
        """\
b = ctypes.c_char_p
attempt(lambda: raw(165, 40, b(b'none'), b(b'/box'), b(b'tmpfs'), 0, 0), lambda: raw(166, 39, b(b'/proc'), 2),
        lambda: raw(165, 40, b(b'none'), b(b'/'), 0, 32 | 4096, 0), lambda: raw(430, 430, b(b'tmpfs'), 0),
        lambda: raw(442, 442, -100, b(b'/'), 0, 0, 0))
""",
    ),
    call(
        "change the root",
        """\
attempt(lambda: os.chroot('/box') or True, lambda: os.chroot('.') or True,
        lambda: raw(155, 41, ctypes.c_char_p(b'.'), ctypes.c_char_p(b'.')))
""",
    ),
    Attack(
        "become root",
        """\
attempt(lambda: os.setuid(0) or True, lambda: os.setresuid(0, 0, 0) or True, lambda: os.setgroups([0]) or True,
        lambda: os.setgid(0) or True)
""",
    ),
    call(
        "regain capabilities",
        """\
head = (ctypes.c_uint32 * 2)(0x20080522, 0)
attempt(lambda: raw(126, 91, head, (ctypes.c_uint32 * 6)(*[0xffffffff] * 6)),
        lambda: libc.prctl(47, 2, 0, 0, 0) == 0)
""",
    ),
    Attack(
        "keep no capability",
        """\
status = dict(l.split(':', 1) for l in open('/proc/self/status') if ':' in l)
attempt(lambda: any(int(status[k], 16) for k in ('CapPrm', 'CapEff', 'CapInh', 'CapAmb')),
        lambda: status['NoNewPrivs'].strip() != '1',
        lambda: status['Seccomp'].strip() != '2')
""",
    ),
    call(
        "bpf, perf and userfaultfd",
        """\
z = ctypes.create_string_buffer(128)
attempt(lambda: raw(321, 280, 0, z, 128), lambda: raw(298, 241, z, 0, -1, -1, 0), lambda: raw(323, 282, 0))
""",
    ),
    call(
        "io_uring",
        "attempt(lambda: raw(425, 425, 4, ctypes.create_string_buffer(120)))",
    ),
    call(
        "keyrings",
        """\
b = ctypes.c_char_p
attempt(lambda: raw(250, 219, 0, -3, 1), lambda: raw(248, 217, b(b'user'), b(b'x'), b(b'y'), 1, -3))
""",
    ),
    call(
        "kernel modules and kexec",
        """\
z = ctypes.create_string_buffer(64)
attempt(lambda: raw(175, 105, z, 64, z), lambda: raw(313, 273, 0, z, 0), lambda: raw(246, 104, 0, 0, 0, 0))
""",
    ),
    call(
        "reboot, swap and accounting",
        """\
b = ctypes.c_char_p
attempt(lambda: raw(169, 142, 0xfee1dead, 672274793, 0, 0), lambda: raw(167, 224, b(b'/box/x'), 0),
        lambda: raw(163, 89, 0))
""",
    ),
    call(
        "names and clocks of the machine",
        """\
attempt(lambda: raw(170, 161, ctypes.c_char_p(b'x'), 1), lambda: raw(171, 162, ctypes.c_char_p(b'x'), 1),
        lambda: raw(227, 112, 0, (ctypes.c_long * 2)(0, 0)), lambda: raw(164, 170, (ctypes.c_long * 2)(0, 0), 0))
""",
    ),
    call(
        "the kernel's log",
        "attempt(lambda: raw(103, 116, 3, ctypes.create_string_buffer(64), 64))",
    ),
    call(
        "ports and personalities",
        """\
attempt(lambda: not ARM and raw(172, 0, 3), lambda: not ARM and raw(173, 0, 0, 8, 1), lambda: raw(135, 92, 0x40000))
""",
    ),
    call(
        "memory without a file system",
        "attempt(lambda: raw(319, 279, ctypes.c_char_p(b'x'), 0), lambda: raw(447, 447, 0))",
    ),
    call(
        "System V and POSIX queues",
        """\
attempt(lambda: raw(29, 194, 1, 4096, 0o1600), lambda: raw(64, 190, 1, 1, 0o1600), lambda: raw(68, 186, 1, 0o1600),
        lambda: raw(240, 180, ctypes.c_char_p(b'x'), 0o102, 0o600, 0))
""",
    ),
    call(
        "watch files",
        "attempt(lambda: raw(294, 26, 0), lambda: raw(300, 262, 0, 0))",
    ),
    call(
        "another machine's system calls",
        """\
attempt(lambda: not ARM and raw(0x40000000 + 39, 0), lambda: not ARM and raw(0x40000000 + 57, 0))
""",
    ),
    call(
        "the 32-bit system call table",
        """\
import mmap
if ARM:
    print('held'); sys.exit(0)
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex('b814000000cd80c3'))
code = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print('escaped', code())
""",
        endings=(Ending.SIGNALLED, Ending.EXITED),
    ),
    call(
        "loosen the filter",
        """\
program = ctypes.create_string_buffer(16)
attempt(lambda: libc.prctl(22, 2, program, 0, 0) == 0, lambda: raw(317, 277, 1, 0, program),
        lambda: libc.prctl(38, 0, 0, 0, 0) == 0)
""",
    ),
    call(
        "drive a terminal or a disk",
        """\
commands = (0x5412, 0x541C, 0x40045431, 0x1260, 0x6601)
attempt(*[lambda c=c: raw(16, 29, 1, c, ctypes.create_string_buffer(64)) for c in commands])
""",
    ),
    call(
        "quotas and handles",
        """\
attempt(lambda: raw(179, 60, 0x80000200, 0, 0, ctypes.create_string_buffer(64)), lambda: raw(312, 272, 1, 1, 0, 0, 0))
""",
    ),
)
