"""Attacks by network and by sockets."""

from __future__ import annotations

from attacks.attack import Attack, call

_REACH = (
    "import socket\n"
    "def reach(family, kind, address):\n"
    "    s = socket.socket(family, kind); s.settimeout(0.5); s.connect(address); s.send(b'x'); return address\n"
)

ATTACKS = (
    Attack(
        "TCP to the service",
        """\
import socket
def reach(family, kind, address):
    s = socket.socket(family, kind); s.settimeout(0.5); s.connect(address); s.send(b'x'); return address
attempt(lambda: reach(socket.AF_INET, socket.SOCK_STREAM, ('127.0.0.1', BAIT['port'])))
""",
    ),
    Attack(
        "UDP",
        """\
import socket
def reach(family, kind, address):
    s = socket.socket(family, kind); s.settimeout(0.5); s.connect(address); s.send(b'x'); return address
attempt(lambda: reach(socket.AF_INET, socket.SOCK_DGRAM, ('127.0.0.1', 9)),
        lambda: reach(socket.AF_INET6, socket.SOCK_DGRAM, ('::1', 9)))
""",
    ),
    Attack(
        "unix socket by path",
        """\
import socket
def reach(family, kind, address):
    s = socket.socket(family, kind); s.settimeout(0.5); s.connect(address); s.send(b'x'); return address
attempt(lambda: reach(socket.AF_UNIX, socket.SOCK_STREAM, BAIT['unix']))
""",
    ),
    Attack(
        "unix socket by abstract name",
        """\
import socket
def reach(family, kind, address):
    s = socket.socket(family, kind); s.settimeout(0.5); s.connect(address); s.send(b'x'); return address
attempt(lambda: reach(socket.AF_UNIX, socket.SOCK_STREAM, chr(0) + BAIT['abstract']))
""",
    ),
    call(
        "sockets by number",
        """\
attempt(*[lambda f=f, k=k: raw(41, 198, f, k, 0) for f in (1, 2, 10, 16, 17, 38, 40) for k in (1, 2, 3)])
""",
    ),
    call(
        "aim a pair of datagram sockets",
        """\
pair = (ctypes.c_int * 2)()
attempt(*[lambda k=k: raw(53, 199, 1, k, 0, pair) for k in (2, 5, 0x80002)])
""",
    ),
    Attack(
        "listen",
        """\
import socket
attempt(lambda: socket.create_server(('127.0.0.1', 0)), lambda: socket.create_server(('0.0.0.0', 8080)))
""",
    ),
    Attack(
        "resolve a name",
        """\
import socket
attempt(lambda: socket.getaddrinfo('example.org', 80), lambda: socket.gethostbyname('example.org'))
""",
    ),
    Attack(
        "fetch a page",
        """\
import urllib.request
attempt(lambda: urllib.request.urlopen('http://127.0.0.1:%d/' % BAIT['port'], timeout=0.5))
""",
    ),
    Attack(
        "reach the service in a shell",
        "(echo x > /dev/tcp/127.0.0.1/1) 2>/dev/null && echo escaped || echo held",
        language="bash",
    ),
)
