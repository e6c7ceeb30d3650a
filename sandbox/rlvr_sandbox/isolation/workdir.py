"""A run's directory where no file system of its own bounds it: its size, and its removal however it was twisted."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator

MAX_ENTRIES = 1024
ENDLESS = 1 << 62


def disk_bytes(place: str) -> int:
    """Bytes of all files under ``place``; ``ENDLESS`` if there are too many or some cannot be seen."""
    total, entries, todo = 0, 0, [place]
    while todo:
        try:
            with os.scandir(todo.pop()) as listing:
                for entry in listing:
                    entries += 1
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
        except FileNotFoundError:  # Removed meanwhile.
            continue
        except OSError:  # Nested too deep to name, or closed to us by its mode.
            return ENDLESS
        if entries > MAX_ENTRIES:
            return ENDLESS
    return total


def remove(place: str) -> None:
    """Remove ``place`` and all beneath; whatever is nested is moved up first, so that no depth can exhaust us."""
    top = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fresh = (f".{token}-{number}" for token in [os.urandom(8).hex()] for number in itertools.count())
        while names := os.listdir(top):
            for name in names:
                _remove_entry(top, name, fresh)
    finally:
        os.close(top)
    os.rmdir(place)


def _remove_entry(top: int, name: str, fresh: Iterator[str]) -> None:
    """Remove one entry of ``top``; a directory gives its directories to ``top`` under ``fresh`` names."""
    with contextlib.suppress(IsADirectoryError, PermissionError):
        os.unlink(name, dir_fd=top)
        return
    os.chmod(name, 0o700, dir_fd=top)
    directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
    try:
        for inner in os.listdir(directory):
            with contextlib.suppress(IsADirectoryError, PermissionError):
                os.unlink(inner, dir_fd=directory)
                continue
            os.chmod(inner, 0o700, dir_fd=directory)
            os.rename(inner, next(fresh), src_dir_fd=directory, dst_dir_fd=top)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=top)
