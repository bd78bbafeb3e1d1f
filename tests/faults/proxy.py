"""A TCP proxy that breaks the network between a Switchyard process and a server, the way it is told.

It stands on a port of its own and dials the server once per connection. Modes apply to established and new
connections alike, and may change at any time: what `hang` held back goes on its way when the mode ends, as
after a healed partition.
"""

import asyncio
import contextlib
import enum
import socket
import struct
import threading
from typing import Any

_CHUNK = 65536
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER on, zero seconds: closing sends RST."""


class Mode(enum.StrEnum):
    """What happens to the bytes."""

    PASS = "pass"
    REFUSE = "refuse"
    """Nobody listens; established connections are closed."""
    RESET = "reset"
    """Connections are accepted and reset; established ones are reset."""
    HANG = "hang"
    """Connections are accepted, nothing is forwarded."""
    DELAY = "delay"
    """Every chunk waits, both ways."""
    DROP_REPLY = "drop-reply"
    """A request that contains the marker passes; its reply does not, and the connection is reset."""


class Proxy:
    """Listens on `port` from construction to `close`. Methods may be called from any thread."""

    def __init__(self, target_port: int) -> None:
        self.num_dropped = 0
        self._target_port = target_port
        self._mode, self._delay_s, self._marker = Mode.PASS, 0.0, b""
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.port = 0
        self._call(self._listen())

    def set(self, mode: Mode, *, delay_s: float = 0.0, marker: bytes = b"") -> None:
        """Behave like that from now on. Returns when it is in force."""
        self._call(self._set(mode, delay_s, marker))

    def cut(self) -> None:
        """Reset every established connection now, whatever the mode."""
        self._call(self._cut())

    def close(self) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _set(self, mode: Mode, delay_s: float, marker: bytes) -> None:
        self._mode, self._delay_s, self._marker = mode, delay_s, marker
        self._changed.set()
        self._changed = asyncio.Event()
        if mode is Mode.REFUSE and self._server is not None:
            self._server.close()
            self._server = None
        elif mode is not Mode.REFUSE and self._server is None:
            await self._listen()
        if mode in (Mode.REFUSE, Mode.RESET):
            await self._cut()

    async def _cut(self) -> None:
        for link in list(self._links):
            link.reset()

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._cut()
        others = asyncio.all_tasks(self._loop) - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        self._links.add(link)
        try:
            await self._pass_gate()
            if self._mode is Mode.RESET:
                return
            there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
            link.writers.append(back)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(link, reader, back, is_request=True))
                group.create_task(self._pump(link, there, writer, is_request=False))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            return  # only `_stop` cancels, and asyncio would report a handler that ends so
        finally:
            link.reset()
            self._links.discard(link)

    async def _pump(
        self, link: "_Link", source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_request: bool
    ) -> None:
        while data := await source.read(_CHUNK):
            await self._pass_gate()
            if is_request and self._mode is Mode.DROP_REPLY and self._marker in data:
                link.is_losing_reply = True
            elif not is_request and link.is_losing_reply:
                self.num_dropped += 1
                break
            sink.write(data)
            await sink.drain()
        raise ConnectionResetError  # one side has closed: so does the other

    async def _pass_gate(self) -> None:
        while self._mode is Mode.HANG:
            await self._changed.wait()
        if self._mode is Mode.DELAY:
            await asyncio.sleep(self._delay_s)


class _Link:
    """One client connection and, once dialled, its other half."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.is_losing_reply = False

    def reset(self) -> None:
        for writer in self.writers:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
