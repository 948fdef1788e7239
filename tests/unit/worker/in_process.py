"""Whole workers inside the test's own process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from llm_engine.serving.worker import Worker
from tests.e2e.mini_router import MiniRouter

SECRET = "in-process-" + "s" * 24


@asynccontextmanager
async def serving(*workers: Worker[Any]) -> AsyncIterator[MiniRouter]:
    """Workers that serve, and a router that knows them; they must end well."""
    serves = []
    async with MiniRouter(SECRET.encode()) as router:
        try:
            for worker in workers:
                info = await worker.start()
                serves.append(asyncio.create_task(worker.serve()))
                await router.connect(info.name, info.request_addr)
            yield router
        finally:
            for worker in workers:
                worker.stop()
            await asyncio.gather(*serves)
