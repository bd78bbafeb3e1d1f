"""Structured logs: one line per turn of a job's life, with ids and durations. Never prompts, keys or headers."""

import logging
import os
import select
import stat
import sys
import threading
from typing import Any

import orjson
import structlog

import settings
from tasks import metrics

_MOST_AT_ONCE = select.PIPE_BUF
"""A pipe that is ready takes this much without blocking."""


def configure(process: str) -> None:
    """Send structlog and the standard library's loggers to stdout in one form."""
    config = settings.load()
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    is_json = config.log_format == "json"
    renderer = structlog.processors.JSONRenderer() if is_json else structlog.dev.ConsoleRenderer(colors=False)
    final: list[structlog.typing.Processor] = [structlog.processors.format_exc_info] if is_json else []
    # A line per turn of each job's life adds up: orjson and a bytes logger halve what one costs.
    own = structlog.processors.JSONRenderer(serializer=orjson.dumps) if is_json else renderer
    output: Any = Output(sys.stdout.fileno())
    factory = structlog.BytesLoggerFactory(output) if is_json else structlog.WriteLoggerFactory(output)
    structlog.configure(
        processors=[*shared, *final, own],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final, renderer],
        )
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    structlog.contextvars.bind_contextvars(process=process)


class Output:
    """A file descriptor that never makes its writer wait: a line that a pipe or a disk does not take is dropped, and
    counted. Nobody may stop serving because nobody reads its log."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._is_torn = False
        """Whether the end of the last line that was written is missing."""
        mode = os.fstat(fd).st_mode
        self._poll: select.poll | None = None
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode):
            self._poll = select.poll()
            self._poll.register(fd, select.POLLOUT)

    def write(self, line: bytes | str) -> int:
        data = line.encode(errors="replace") if isinstance(line, str) else line
        with self._lock:
            if not self._put(b"\n" + data if self._is_torn else data):
                metrics.DROPPED_LOG_LINES.inc()
        return len(line)

    def flush(self) -> None:
        return

    def _put(self, data: bytes) -> bool:
        has_begun = False
        try:
            while data:
                if self._poll is not None and not self._poll.poll(0):
                    break
                # To a disk all of it, in one write: lines of several processes in one file stay whole.
                size = os.write(self._fd, data if self._poll is None else data[:_MOST_AT_ONCE])
                data, has_begun, self._is_torn = data[size:], True, False
        except OSError:
            pass
        self._is_torn = self._is_torn or (has_begun and bool(data))
        return not data
