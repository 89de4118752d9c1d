"""Run slow work outside the event loop, with one thread for each kind, so that short work never waits for long work."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar, get_args

LONG = 1 << 16  # characters or bytes
Kind = Literal["short", "long", "grammar"]
T = TypeVar("T")
_THREADS = {kind: ThreadPoolExecutor(1, kind) for kind in get_args(Kind)}


async def run_in_background(work: Callable[[], T], kind: Kind) -> T:
    """Run `work` in its kind's thread, first come first served; work whose awaiter was cancelled is not started."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS[kind], work)


def kind_of(size: int) -> Kind:
    return "long" if size > LONG else "short"
