"""Servers that could lose what was accepted are refused, with the remedy."""

import contextlib
from collections.abc import Iterator

import pytest
import redis

from settings import Settings
from tasks import server_settings


@pytest.fixture
def config(server_urls: tuple[str, str]) -> Settings:
    """The tests' own Postgres runs without fsync."""
    return Settings(database_url=server_urls[0], redis_url=server_urls[1], unsafe_servers=False)


@pytest.fixture
def evicting(config: Settings) -> Iterator[None]:
    with contextlib.closing(redis.Redis.from_url(config.redis_url)) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        yield
        client.config_set("maxmemory-policy", "noeviction")


def test_a_postgres_that_does_not_flush_is_refused(config: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        server_settings.check(config)
    said = capsys.readouterr().err
    assert "fsync=off" in said
    assert "set fsync=on" in said
    assert said.count("\n") == 1


def test_who_accepts_the_loss_may_run(config: Settings) -> None:
    server_settings.check(config.model_copy(update={"unsafe_servers": True}))


@pytest.mark.usefixtures("evicting")
def test_a_redis_that_evicts_is_refused(config: Settings) -> None:
    away = config.model_copy(update={"database_url": "postgresql://127.0.0.1:1/none"})
    assert "noeviction" in (server_settings.problem(away) or "")


def test_servers_that_are_away_are_waited_for(config: Settings) -> None:
    away = {"database_url": "postgresql://127.0.0.1:1/none", "redis_url": "redis://127.0.0.1:1/0"}
    server_settings.check(config.model_copy(update=away))
