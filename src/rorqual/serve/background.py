"""Run slow work outside the event loop, with one thread for each kind, so that short work never waits for long work."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

LONG = 1 << 16  # characters or bytes
Kind = Literal["short", "long", "grammar"]
_THREADS = {kind: ThreadPoolExecutor(1, kind) for kind in ("short", "long", "grammar")}


async def run_in_background(work: Callable[[], Any], kind: Kind) -> Any:
    """Run `work` in its kind's thread, first come first served; work whose awaiter was cancelled is not started."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS[kind], work)


def kind_of(size: int) -> Kind:
    return "long" if size > LONG else "short"
