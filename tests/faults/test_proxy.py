"""The fault proxy does what its modes say, and nothing more."""

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import Mode, Proxy


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.settimeout(10)
        with contextlib.suppress(OSError):
            while data := self.request.recv(4096):
                self.request.sendall(data)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with _Server(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        made = Proxy(server.server_address[1])
        yield made
        made.close()
        server.shutdown()
        thread.join()


def dial(proxy: Proxy, timeout_s: float = 2.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout_s)


def exchange(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    return connection.recv(4096)


def test_passes(proxy: Proxy) -> None:
    with dial(proxy) as connection:
        assert exchange(connection, b"one") == b"one"
        assert exchange(connection, b"two") == b"two"


def test_refuses_and_comes_back_on_the_same_port(proxy: Proxy) -> None:
    with dial(proxy) as connection:
        assert exchange(connection, b"x") == b"x"
        proxy.set(Mode.REFUSE)
        with pytest.raises(ConnectionError):
            exchange(connection, b"y")
    with pytest.raises(ConnectionRefusedError):
        dial(proxy)
    proxy.set(Mode.PASS)
    with dial(proxy) as connection:
        assert exchange(connection, b"z") == b"z"


def test_resets_old_and_new_connections(proxy: Proxy) -> None:
    with dial(proxy) as old:
        assert exchange(old, b"x") == b"x"
        proxy.set(Mode.RESET)
        with pytest.raises(ConnectionResetError):
            exchange(old, b"y")
    with pytest.raises(ConnectionError), dial(proxy) as new:
        exchange(new, b"z")


def test_a_hang_holds_bytes_back_and_lets_them_go_when_it_ends(proxy: Proxy) -> None:
    with dial(proxy, 0.3) as connection:
        assert exchange(connection, b"x") == b"x"
        proxy.set(Mode.HANG)
        with pytest.raises(TimeoutError):
            exchange(connection, b"held")
        with dial(proxy, 0.3) as other, pytest.raises(TimeoutError):
            exchange(other, b"nothing")
        proxy.set(Mode.PASS)
        connection.settimeout(2)
        assert connection.recv(4096) == b"held"


def test_delays_each_way(proxy: Proxy) -> None:
    with dial(proxy) as connection:
        assert exchange(connection, b"x") == b"x"
        proxy.set(Mode.DELAY, delay_s=0.1)
        started = time.monotonic()
        assert exchange(connection, b"y") == b"y"
        assert time.monotonic() - started >= 0.2


def test_drops_only_the_reply_to_what_carries_the_marker(proxy: Proxy) -> None:
    proxy.set(Mode.DROP_REPLY, marker=b"COMMIT")
    with dial(proxy) as connection:
        assert exchange(connection, b"BEGIN") == b"BEGIN"
        with pytest.raises(ConnectionResetError):
            exchange(connection, b"COMMIT")
    assert proxy.num_dropped == 1


def test_cuts_at_once_and_goes_on_with_new_connections(proxy: Proxy) -> None:
    with dial(proxy) as connection:
        assert exchange(connection, b"x") == b"x"
        proxy.cut()
        with pytest.raises(ConnectionError):
            exchange(connection, b"y")
    with dial(proxy) as connection:
        assert exchange(connection, b"z") == b"z"
