"""A gate that many pass together, or one alone."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Gate:
    """What passes `alone` has nobody beside it; those who come meanwhile wait outside."""

    def __init__(self) -> None:
        self._num_inside = 0
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._is_empty = asyncio.Event()
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Pass with everyone else who does."""
        while not self._is_open.is_set():
            await self._is_open.wait()
        self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1
            if not self._num_inside:
                self._is_empty.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Close the gate, wait until it is empty, pass, and open it again."""
        async with self._turn:
            self._is_open.clear()
            try:
                while self._num_inside:
                    self._is_empty.clear()
                    await self._is_empty.wait()
                yield
            finally:
                self._is_open.set()
