"""Structured logs: one line per turn of a job's life, with ids and durations. Never prompts, keys or headers."""

import logging
import sys

import orjson
import structlog

import settings


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
    factory = structlog.BytesLoggerFactory(sys.stdout.buffer) if is_json else structlog.WriteLoggerFactory(sys.stdout)
    structlog.configure(
        processors=[*shared, *final, own],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final, renderer],
        )
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    structlog.contextvars.bind_contextvars(process=process)
