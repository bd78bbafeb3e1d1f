"""A load generator that leaves the machine to what it measures: HTTP/1.1 keep-alive over raw sockets.

The benchmarks share two cores with the server, so each request may cost the client microseconds only.
The loop is epoll and not asyncio for two more reasons: asyncio's timers round to whole milliseconds,
which an open loop would report as latency, and its transports cost twice as much a request.

Closed loop: N callers, each sends when its answer is in. It finds the throughput. Open loop: requests
leave at a fixed rate whatever happens, and latency counts from when one was due, so a server that
stalls is charged for everybody who had to wait.
"""

import math
import multiprocessing
import re
import select
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_BUSY = 0.8
"""Share of one core above which an open loop would measure the client itself."""
PATIENCE_S = 300.0
"""Longest wait for the answers that are still out when a run is over."""

_clock = time.perf_counter


class LoadError(Exception):
    """The run measured something other than what was asked: wrong answers, or a client too busy."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what they say."""

    port: int
    body: str
    """JSON; each `{number}` in it becomes a different twelve-digit number in every request."""
    path: str = "/v1/chat/completions"
    headers: Mapping[str, str] = field(default_factory=dict)
    expected: bytes = b""
    """In lower case: what the head of every answer must contain."""
    first: "re.Pattern[bytes] | None" = None
    """Of a stream: what an answer contains from its first token on."""
    statuses: tuple[bytes, ...] = (b"200",)
    num_bodies: int = 10**12
    """After so many different requests the first comes again."""

    def request(self, number: int) -> bytes:
        """One whole request."""
        before, *others = self._parts()
        return b"".join([before, *[b"%012d%b" % (number, other) for other in others]])

    def _parts(self) -> list[bytes]:
        body = self.body.replace("{number}", "0" * 12)
        lines = [f"POST {self.path} HTTP/1.1", f"host: 127.0.0.1:{self.port}", "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines.append(f"content-length: {len(body.encode())}")
        head = "\r\n".join(lines) + "\r\n\r\n"
        return [part.encode() for part in (head + self.body).split("{number}")]


@dataclass(frozen=True, slots=True)
class Result:
    """What one run saw. Times in seconds."""

    seconds: float
    latencies: list[float]
    first_latencies: list[float]
    """Until the first token, where the target says how to see it."""
    busy: float
    """The client's own CPU time as a share of one core."""

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    def latency_ms(self, share: float) -> float:
        """The latency that this share of the answers did not exceed."""
        return percentile(self.latencies, share) * 1000

    def first_ms(self, share: float) -> float:
        return percentile(self.first_latencies, share) * 1000


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed (nearest rank); NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    # Rounded first: 0.99 * 100 is a hair above 99 in floating point.
    rank = math.ceil(round(share * len(ordered), 9))
    return ordered[max(rank, 1) - 1]


def closed_loop(target: Target, *, concurrency: int, seconds: float, warmup_s: float = 1.0, start: int = 0) -> Result:
    """`concurrency` callers without a pause; counts the answers that arrive in `seconds` after the warm-up."""
    with _Pool(target, concurrency, start) as pool:
        result = _Recorder()
        begin = _clock() + warmup_s
        end = begin + seconds
        cpu: float | None = None
        for connection in pool.take_idle():
            pool.send(connection, _clock())
        while (now := _clock()) < end:
            if cpu is None and now >= begin:
                cpu = time.process_time()
            for connection in pool.answered(min(end - now, 0.1)):
                now = _clock()
                if now >= begin:
                    result.add(connection, now)
                pool.send(connection, now)
        assert cpu is not None
        busy = (time.process_time() - cpu) / (_clock() - begin)
        pool.drain()
    if not result.latencies:
        raise LoadError(f"not one answer in {seconds:g} s with {concurrency} callers")
    return Result(seconds, result.latencies, result.first_latencies, busy)


def fixed_number(target: Target, *, concurrency: int, requests: int, start: int = 0) -> Result:
    """`concurrency` callers until `requests` are answered; `seconds` is how long that took."""
    with _Pool(target, concurrency, start) as pool:
        result = _Recorder()
        cpu, begin = time.process_time(), _clock()
        num_sent = 0
        for connection in pool.take_idle()[:requests]:
            pool.send(connection, _clock())
            num_sent += 1
        heard = begin
        while len(result.latencies) < requests:
            if _clock() > heard + PATIENCE_S:
                raise LoadError(f"no answer within {PATIENCE_S:g} s")
            for connection in pool.answered(1.0):
                heard = _clock()
                result.add(connection, heard)
                if num_sent < requests:
                    pool.send(connection, heard)
                    num_sent += 1
        seconds = _clock() - begin
    return Result(seconds, result.latencies, result.first_latencies, (time.process_time() - cpu) / seconds)


def open_loop(target: Target, *, rate: float, seconds: float, connections: int = 64, start: int = 0) -> Result:
    """`rate` requests a second. Latency counts from when a request was due, not from when it could be sent."""
    with _Pool(target, connections, start) as pool:
        result = _Recorder()
        total = round(rate * seconds)
        idle = pool.take_idle()
        cpu, begin = time.process_time(), _clock()
        num_sent = 0
        while len(result.latencies) < total:
            now = _clock()
            while num_sent < total and idle and (due := begin + num_sent / rate) <= now:
                pool.send(idle.pop(), due)
                num_sent += 1
            if now > begin + seconds + PATIENCE_S:
                raise LoadError(f"{total - len(result.latencies)} of {total} requests were never answered")
            is_waiting_for_time = num_sent < total and idle
            wait = begin + num_sent / rate - _clock() if is_waiting_for_time else 1.0
            for connection in pool.answered(max(wait, 0.0)):
                result.add(connection, _clock())
                idle.append(connection)
        elapsed = _clock() - begin
        busy = (time.process_time() - cpu) / elapsed
    check_busy(busy)
    return Result(elapsed, result.latencies, result.first_latencies, busy)


def open_loops(loops: Sequence[tuple[Target, float, int]], seconds: float) -> None:
    """Open loops at once, each (target, rate, number of its first request) in its own process. Raises LoadError."""
    children = [
        multiprocessing.Process(
            target=open_loop, args=(target,), kwargs={"rate": rate, "seconds": seconds, "start": start}
        )
        for target, rate, start in loops
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
        if child.exitcode:
            raise LoadError("a load generator failed")


def check_busy(busy: float) -> None:
    """Raises LoadError where the client was so busy that it measured itself."""
    if busy > MAX_BUSY:
        raise LoadError(f"the load generator was busy {busy:.0%} of a core: its latencies are its own")


class _Recorder:
    """Latencies as they come in."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.first_latencies: list[float] = []

    def add(self, connection: "_Connection", now: float) -> None:
        self.latencies.append(now - connection.since)
        if connection.first_at:
            self.first_latencies.append(connection.first_at - connection.since)


class _Connection:
    """A socket and the answer that is arriving on it."""

    __slots__ = ("buffer", "first_at", "is_out", "length", "since", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=5.0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.is_out = False
        self.since = self.first_at = 0.0
        self.buffer = b""
        self.length: int | None = None

    def begin(self, since: float) -> None:
        self.since, self.first_at = since, 0.0
        self.buffer, self.length = b"", None
        self.is_out = True


class _Pool:
    """The connections of one run."""

    def __init__(self, target: Target, size: int, start: int) -> None:
        self._target = target
        self._before, *self._others = target._parts()  # noqa: SLF001
        self._number = start
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        for _ in range(size):
            self._open()

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections.values():
            connection.socket.close()
        self._epoll.close()

    def take_idle(self) -> list[_Connection]:
        return [connection for connection in self._connections.values() if not connection.is_out]

    def send(self, connection: _Connection, since: float) -> None:
        """Send the next request; its latency counts from `since`."""
        number = b"%012d" % (self._number % self._target.num_bodies)
        self._number += 1
        request = number.join([self._before, *self._others])
        connection.begin(since)
        if connection.socket.send(request) != len(request):
            raise LoadError("a request did not fit into the socket's buffer")

    def answered(self, wait_s: float) -> list[_Connection]:
        """The connections whose answer became whole; waits for the first event at most `wait_s`."""
        # select keeps microseconds where epoll rounds its timeout up to milliseconds.
        if not select.select([self._epoll], [], [], wait_s)[0]:
            return []
        whole = []
        for descriptor, _ in self._epoll.poll(0):
            connection = self._connections[descriptor]
            data = connection.socket.recv(262_144)
            if not data:
                self._reopen(connection)
            elif self._receive(connection, data):
                connection.is_out = False
                whole.append(connection)
        return whole

    def drain(self) -> None:
        """Wait for what is still out, so that it does not run into whatever is measured next."""
        deadline = _clock() + PATIENCE_S
        while any(connection.is_out for connection in self._connections.values()):
            self.answered(0.1)
            if _clock() > deadline:
                raise LoadError(f"answers still missing after {PATIENCE_S:g} s")

    def _receive(self, connection: _Connection, data: bytes) -> bool:
        """Whether the answer is whole with `data`."""
        buffer = connection.buffer = connection.buffer + data if connection.buffer else data
        first = self._target.first
        if first is not None and not connection.first_at and first.search(buffer):
            connection.first_at = _clock()
        if connection.length is None:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return False
            connection.length = self._read_head(buffer, end)
        if connection.length < 0:
            return buffer.endswith(b"\r\n0\r\n\r\n")
        return len(buffer) >= connection.length

    def _read_head(self, buffer: bytes, end: int) -> int:
        """Bytes of the whole answer; -1 where it comes in chunks."""
        head = buffer[:end].lower()
        if head[9:12] not in self._target.statuses or self._target.expected not in head:
            raise LoadError(f"unexpected answer: {buffer[:600].decode(errors='replace')}")
        at = head.find(b"content-length:")
        if at < 0:
            return -1
        return end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])

    def _open(self) -> _Connection:
        connection = _Connection(self._target.port)
        self._connections[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket, select.EPOLLIN)
        return connection

    def _reopen(self, connection: _Connection) -> None:
        """Servers close connections that idle too long; one that closes in mid-answer has failed."""
        if connection.is_out:
            raise LoadError("the server closed a connection before its answer was whole")
        self._epoll.unregister(connection.socket)
        del self._connections[connection.socket.fileno()]
        connection.socket.close()
        fresh = _Connection(self._target.port)
        connection.socket = fresh.socket
        self._connections[fresh.socket.fileno()] = connection
        self._epoll.register(fresh.socket, select.EPOLLIN)
