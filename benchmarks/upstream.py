"""`python -m benchmarks.upstream PORT FILE`: answers every POST with the bytes of FILE, as cheaply as Python can.

It stands behind the gateways that Switchyard is compared with: what is measured is then theirs alone.
"""

import argparse
import asyncio
from pathlib import Path
from typing import cast

import uvloop


class _Connection(asyncio.Protocol):
    """One keep-alive connection; requests come one after the other."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._buffer = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface without the base class.
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._buffer += data
        while (length := _request_length(self._buffer)) is not None:
            self._buffer = self._buffer[length:]
            self._transport.write(self._answer)


def _request_length(buffer: bytes) -> int | None:
    """Bytes of the first request in `buffer`; None while it is not whole."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = buffer[:end].lower()
    if b"transfer-encoding: chunked" in head:
        last = buffer.find(b"\r\n0\r\n\r\n", end)
        return last + 7 if last >= 0 else None
    at = head.find(b"content-length:")
    length = end + 4 + (int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0)
    return length if len(buffer) >= length else None


async def serve(port: int, body: bytes) -> None:
    """Answer on `port` of the loopback address until cancelled."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    answer = head.encode() + body
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(answer), "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upstream", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    uvloop.run(serve(args.port, args.file.read_bytes()))


if __name__ == "__main__":
    main()
