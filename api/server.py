"""`python -m api.server`: one gateway process. Several share the port; the kernel spreads connections."""

import argparse
import socket
import sys

import uvicorn

import settings
from api.app import create_app
from api.framing import Framing
from tasks import logs, server_settings

_VANISHED = (
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 10),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 5),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 3),
    ((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT), 25_000),
)
"""A client whose machine or network is gone says nothing, not even goodbye: it is noticed within 30 s."""
_LAST_WORDS_S = 2.0
"""Before the server closes what is still open, those who wait are told to ask another process."""


class _Server(uvicorn.Server):
    """Says that it is stopping before it stops, so a load balancer can look elsewhere."""

    def handle_exit(self, sig: int, frame: object) -> None:
        state = self.config.app.state  # type: ignore[union-attr]
        if not state.is_stopping and hasattr(state, "gateway"):
            state.gateway.stop_waiting_in(max(state.gateway.config.drain_s - _LAST_WORDS_S, 0.0))
        state.is_stopping = True
        super().handle_exit(sig, frame)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m api.server", description=__doc__)
    parser.add_argument("--index", type=int, default=0, help="number of this process, for its logs")
    index = parser.parse_args().index
    config = settings.load()
    logs.configure(f"gateway{index}")
    server_settings.check(config)
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    for option, value in _VANISHED:
        # Every accepted connection inherits them.
        listener.setsockopt(*option, value)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        print(f"cannot listen on {config.host}:{config.port} ({error.strerror}); set SWITCHYARD_PORT", file=sys.stderr)
        return 1
    server = _Server(
        uvicorn.Config(
            create_app(),
            loop="uvloop",
            http=Framing,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(config.drain_s),
            backlog=2048,
        )
    )
    server.run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
