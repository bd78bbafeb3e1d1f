"""Refuses to start on servers whose settings would break the promise: accepted means on disk."""

import contextlib
import sys

import redis
import structlog
from redis.exceptions import RedisError

from db import session
from settings import Settings

log = structlog.get_logger()


def check(config: Settings) -> None:
    """Exit with one line that names the setting and its remedy. A server that cannot be reached, or does not
    tell, is left for later: the process then waits for it anyway."""
    found = problem(config)
    if found is None:
        return
    if config.unsafe_servers:
        log.warning("servers.unsafe", problem=found)
        return
    print(f"{found}; or set SWITCHYARD_UNSAFE_SERVERS=true and accept the loss", file=sys.stderr)
    raise SystemExit(1)


def problem(config: Settings) -> str | None:
    """The first unsafe setting and what to do about it."""
    return _postgres(config.database_url) or _redis(config.redis_url)


def _postgres(url: str) -> str | None:
    try:
        with contextlib.closing(session.connect(url, "switchyard-check")) as connection, connection.cursor() as cursor:
            # synchronous_commit is not among them: each of our connections sets its own.
            for name in ("fsync", "full_page_writes"):
                if session.server_setting(cursor, name) != "on":
                    return f"Postgres runs with {name}=off and would lose accepted jobs in a crash: set {name}=on"
    except session.DependencyDown as error:
        log.warning("servers.unchecked", server="postgres", error=type(error).__name__)
    return None


def _redis(url: str) -> str | None:
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=1.0, socket_timeout=2.0) as client:
            policy = client.config_get("maxmemory-policy").get("maxmemory-policy", "noeviction")
    except (RedisError, OSError) as error:
        # Hosted servers often forbid CONFIG.
        log.warning("servers.unchecked", server="redis", error=type(error).__name__)
        return None
    if policy != "noeviction":
        return f"Redis evicts keys ({policy}) and would lose messages and streams: set maxmemory-policy noeviction"
    return None
