"""Running programs that nobody trusts: slots with a warm interpreter behind the walls of one backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlvr_sandbox.isolation.executor import SlotExecutor


async def open_executor(
    backend: str = "auto", slots: int = 2, unsafe: bool = False, numpy: bool = False
) -> SlotExecutor:
    """Start ``slots`` warm slots behind ``backend`` and attack them before anybody relies on them.

    Args:
        backend: ``ns``, ``landlock``, ``bwrap``, ``none``, or ``auto`` for the first of the first three that holds.
        slots: Programs that may run at once; sessions may take as many again.
        unsafe: Permits ``none``, which isolates nothing.
        numpy: Import numpy into the warm interpreter, so that programs need not.

    Raises:
        SandboxError: If no backend that was asked for holds; it names what failed and the mend.
    """
    # The warm interpreter imports this package too and must not carry asyncio into every program.
    from rlvr_sandbox.isolation.choice import choose

    return await choose(backend, slots=slots, unsafe=unsafe, numpy=numpy)
