"""Work that takes a while, beside the event loop. What is long has a thread that what is short never waits for."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

LONG = 1 << 16  # characters or bytes
Kind = Literal["short", "long", "grammar"]
_THREADS = {kind: ThreadPoolExecutor(1, kind) for kind in ("short", "long", "grammar")}


async def run_in_background(work: Callable[[], Any], kind: Kind) -> Any:
    """One thing of a kind at a time, in the order in which they came; what nobody waits for any more is not begun."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS[kind], work)


def kind_of(size: int) -> Kind:
    return "long" if size > LONG else "short"
