"""Tasks that need no turn of the event loop to begin."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any


def start(tasks: asyncio.TaskGroup, coroutine: Coroutine[Any, Any, None]) -> None:
    """Run it as a task of the group; up to its first wait here and now, where Python can (3.12)."""
    if sys.version_info < (3, 12):
        tasks.create_task(coroutine)
        return
    task = asyncio.Task(coroutine, loop=asyncio.get_running_loop(), eager_start=True)
    if not task.done() or task.cancelled() or task.exception() is not None:
        tasks.create_task(_end_of(task))  # its failure is the group's, and the group's end is its own


async def _end_of(task: asyncio.Task[None]) -> None:
    await task
