"""The languages that programs may be in: how each is compiled and run, and whether this machine can."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Language:
    """One language.

    Attributes:
        name: What ``Program.language`` says.
        file: The name of the program's file.
        run: The command, its tool by name; empty runs in the warm interpreter.
        compile: The shell command that makes ``artifact`` from ``file``; empty where nothing is compiled.
        artifact: The file that the compiler makes.
        processes: Processes and threads that the runtime itself needs.
        address_space: Whether the runtime lives with a bounded address space.
        memory_marks: How its errors begin or end when memory is refused.
        env: What its runtime needs in the environment.
    """

    name: str
    file: str
    run: tuple[str, ...] = ()
    compile: tuple[str, ...] = ()
    artifact: str = ""
    processes: int = 1
    address_space: bool = True
    memory_marks: tuple[bytes, ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    @property
    def tool(self) -> str:
        """The program that must be installed; empty where it is the interpreter itself."""
        return (self.compile or self.run or ("",))[0]


_BAD_ALLOC = (b"std::bad_alloc", b"Cannot allocate memory")

LANGUAGES = {
    language.name: language
    for language in (
        Language("python", "main.py", memory_marks=(b"MemoryError",)),
        Language(
            "cpp",
            "main.cpp",
            run=("./main",),
            compile=("g++", "-std=c++17", "-O2", "-pipe", "-o", "main", "main.cpp"),
            artifact="main",
            memory_marks=_BAD_ALLOC,
        ),
        Language(
            "c",
            "main.c",
            run=("./main",),
            compile=("gcc", "-std=c17", "-O2", "-pipe", "-o", "main", "main.c", "-lm"),
            artifact="main",
            memory_marks=_BAD_ALLOC,
        ),
        Language(
            "javascript",
            "main.js",
            run=("node", "--single-threaded-gc", "main.js"),
            processes=24,
            address_space=False,
            memory_marks=(b"JavaScript heap out of memory",),
            env=(("OPENSSL_CONF", "/dev/null"),),
        ),
        Language("bash", "main.sh", run=("bash", "main.sh"), processes=16),
        Language("perl", "main.pl", run=("perl", "main.pl"), memory_marks=(b"Out of memory!",)),
    )
}

TOOL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find_tool(language: Language) -> str | None:
    """Where the language's tool is, as programs will find it; ``None`` where it is missing."""
    return shutil.which(language.tool, path=TOOL_PATH) if language.tool else sys.executable


def available() -> tuple[str, ...]:
    """The languages whose tools are installed here, Python first."""
    return tuple(name for name, language in LANGUAGES.items() if find_tool(language))


def toolchain(language: Language) -> str:
    """A name for the exact compiler: its real path, size and time of change."""
    path = os.path.realpath(find_tool(language) or language.tool)
    facts = os.stat(path)
    return f"{path}:{facts.st_size}:{facts.st_mtime_ns}"
