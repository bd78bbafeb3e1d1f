"""The load generator's arithmetic, against servers whose behaviour is known to the millisecond."""

import contextlib
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import pytest

from benchmarks import load
from benchmarks.load import LoadError, Target

OK = b"HTTP/1.1 200 OK\r\nX-Cache: HIT\r\nContent-Length: 2\r\n\r\n{}"


@contextlib.contextmanager
def server(answer: Callable[[int, bytes], Iterable[bytes]]) -> Iterator[int]:
    """Serves each connection in a thread; `answer(number, request)` gives the pieces to send, none to hang up."""
    listener = socket.create_server(("127.0.0.1", 0))
    sockets: list[socket.socket] = []
    lock = threading.Lock()
    count = 0

    def serve(connection: socket.socket) -> None:
        nonlocal count
        with contextlib.suppress(OSError), connection:
            while request := connection.recv(65_536):
                with lock:
                    count += 1
                    number = count
                has_answered = False
                for piece in answer(number, request):
                    # Each in a packet of its own, as far as the loopback lets one choose.
                    connection.sendall(piece)
                    time.sleep(0.001)
                    has_answered = True
                if not has_answered:
                    return

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                sockets.append(connection)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        for connection in sockets:
            connection.close()


def slow(seconds: float) -> Callable[[int, bytes], list[bytes]]:
    def answer(_: int, __: bytes) -> list[bytes]:
        time.sleep(seconds)
        return [OK]

    return answer


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.01, 1), (0.5, 50), (0.501, 51), (0.99, 99), (0.991, 100), (1.0, 100)]
)
def test_percentile_is_the_nearest_rank(share: float, expected: int) -> None:
    assert load.percentile(range(100, 0, -1), share) == expected


def test_percentile_of_few_values_is_one_of_them() -> None:
    assert load.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert load.percentile([3.0, 1.0], 0.5) == 1.0
    assert load.percentile([7.0], 0.99) == 7.0


def test_percentile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(load.percentile([], 0.5))


def test_a_result_counts_a_second_and_in_milliseconds() -> None:
    result = load.Result(seconds=2.0, latencies=[0.001, 0.002, 0.003, 0.004], first_latencies=[0.5], busy=0.1)

    assert result.rate == 2.0
    assert result.latency_ms(0.5) == 2.0
    assert result.first_ms(0.5) == 500.0


def test_requests_differ_in_their_number_alone() -> None:
    target = Target(8080, '{"a": "{number}", "b": "{number}"}', headers={"authorization": "Bearer key"})

    head, _, body = target.request(7).partition(b"\r\n\r\n")

    assert body == b'{"a": "000000000007", "b": "000000000007"}'
    assert f"content-length: {len(body)}".encode() in head.split(b"\r\n")
    assert b"authorization: Bearer key" in head.split(b"\r\n")
    assert target.request(8) == target.request(7).replace(b"007", b"008")


def test_no_number_is_sent_twice() -> None:
    seen: list[bytes] = []

    def remember(_: int, request: bytes) -> list[bytes]:
        seen.append(request[-12:])
        return [OK]

    with server(remember) as port:
        load.fixed_number(Target(port, "{number}"), concurrency=4, requests=40, start=100)

    assert sorted(seen) == [b"%012d" % number for number in range(100, 140)]


def test_closed_loop_counts_what_its_callers_can_do() -> None:
    with server(slow(0.02)) as port:
        result = load.closed_loop(Target(port, "{}"), concurrency=4, seconds=0.5, warmup_s=0.1)

    assert result.seconds == 0.5
    # Four callers, 20 ms each: 200/s, less what a busy machine adds.
    assert 60 <= result.rate <= 204
    assert result.latency_ms(0.0) >= 20.0
    assert len(result.latencies) == round(result.rate * 0.5)


def test_open_loop_charges_a_stall_to_everybody_who_was_due() -> None:
    def stalls_once(number: int, _: bytes) -> list[bytes]:
        time.sleep(0.3 if number == 10 else 0.0)
        return [OK]

    with server(stalls_once) as port:
        # One connection: whatever is due during the stall has to wait for it.
        result = load.open_loop(Target(port, "{}"), rate=100, seconds=0.5, connections=1)

    assert len(result.latencies) == 50
    waited = [latency for latency in result.latencies if latency > 0.05]
    # 300 ms at 100/s: thirty requests were due, all but those of the last 50 ms waited longer than that.
    assert 20 <= len(waited) <= 40
    assert max(result.latencies) >= 0.3


def test_open_loop_keeps_its_rate() -> None:
    with server(slow(0.0)) as port:
        result = load.open_loop(Target(port, "{}"), rate=200, seconds=0.5)

    assert len(result.latencies) == 100
    assert 0.49 <= result.seconds <= 1.0
    assert 0.0 < result.busy <= load.MAX_BUSY


def test_a_client_too_busy_fails_the_run() -> None:
    load.check_busy(0.8)
    with pytest.raises(LoadError, match="busy 81% of a core"):
        load.check_busy(0.81)


def test_first_token_is_timed_apart_from_the_whole() -> None:
    def chunk(data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data)

    def stream(_: int, __: bytes) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        yield chunk(b'data: {"content":""}\n\n')
        time.sleep(0.03)
        yield chunk(b'data: {"content":"A"}\n\n')
        time.sleep(0.03)
        yield chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

    with server(stream) as port:
        target = Target(port, "{}", first=re.compile(rb'"content":"[^"]'))
        result = load.fixed_number(target, concurrency=2, requests=6)

    assert len(result.first_latencies) == 6
    assert result.first_ms(0.0) >= 30.0
    rests = [whole - first for first, whole in zip(result.first_latencies, result.latencies, strict=True)]
    assert min(rests) > 0
    assert max(rests) >= 0.02  # all but one may shrink: a reader that a busy machine held up finds both pieces at once


def test_an_answer_in_pieces_is_one_answer() -> None:
    with server(lambda _, __: [OK[:20], OK[20:50], OK[50:]]) as port:
        result = load.fixed_number(Target(port, "{}", expected=b"x-cache: hit"), concurrency=2, requests=20)

    assert len(result.latencies) == 20


def test_another_answer_than_expected_fails_the_run() -> None:
    with server(lambda _, __: [OK]) as port, pytest.raises(LoadError, match="unexpected answer"):
        load.fixed_number(Target(port, "{}", expected=b"x-cache: bypass"), concurrency=1, requests=1)


def test_an_error_status_fails_the_run() -> None:
    refusal = OK.replace(b"200 OK", b"503 Service Unavailable")
    with server(lambda _, __: [refusal]) as port, pytest.raises(LoadError, match="503"):
        load.closed_loop(Target(port, "{}"), concurrency=1, seconds=0.2, warmup_s=0.0)


def test_a_connection_lost_in_mid_answer_fails_the_run() -> None:
    with server(lambda _, __: []) as port, pytest.raises(LoadError, match="closed a connection"):
        load.fixed_number(Target(port, "{}"), concurrency=1, requests=1)
