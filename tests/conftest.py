"""Servers and stacks for the whole suite. Tests run against the embedded servers, or against those that
SWITCHYARD_DATABASE_URL and SWITCHYARD_REDIS_URL name (their databases `switchyard_test_*` and Redis
databases 15, 14 … are used, and emptied). Of the processes that share the suite each has its own servers, or
its own databases on those that were given."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

import settings
from local import servers
from tests.stack import PROCESS, Stack, fresh_database

ECHO = """
backends:
  echo: {runtime: echo, concurrency: 64, max_queued: 500}
  spare: {runtime: echo, concurrency: 64}
  nobody: {runtime: echo, concurrency: 64}
models:
  echo: {path: echo, backends: [echo], context_length: 4096}
  spare: {path: echo, backends: [spare], aliases: [other], mask: [secret, sesame]}
  asleep: {path: echo, backends: [nobody], fallback: [echo], auto: false}
  away: {path: echo, backends: [nobody], auto: false}
limits: {body_bytes: 65536, inputs: 64, n: 8}
"""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, so that no process is left alone with one of them at the end: those that load models,
    then those that start processes."""
    weights = {"models": 2, "vllm": 2, "slow": 2, "e2e": 1}
    heaviest: dict[Path, int] = {}
    for item in items:
        weight = max((weights.get(mark.name, 0) for mark in item.iter_markers()), default=0)
        heaviest[item.path] = max(weight, heaviest.get(item.path, 0))
    items.sort(key=lambda item: -heaviest[item.path])


@pytest.fixture(scope="session")
def server_urls() -> Iterator[tuple[str, str]]:
    """(Postgres, Redis) of the session."""
    given = os.environ.get("SWITCHYARD_DATABASE_URL"), os.environ.get("SWITCHYARD_REDIS_URL")
    if given[0] and given[1]:
        yield given[0], f"{given[1].rsplit('/', 1)[0]}/{15 - PROCESS}"
        return
    with servers.throwaway() as (postgres, valkey):
        yield postgres.url, valkey.url


@pytest.fixture(scope="session")
def database_url(server_urls: tuple[str, str]) -> Iterator[str]:
    """A migrated database for tests of statements; every test leaves its own rows behind."""
    with fresh_database(server_urls[0], "switchyard_test_statements") as url:
        yield url


@pytest.fixture(scope="session")
def redis_url(server_urls: tuple[str, str]) -> str:
    return server_urls[1]


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Gateway, reconciler and an echo worker, over a database of their own."""
    folder = tmp_path_factory.mktemp("stack")
    yield from running(server_urls, folder, ECHO, ["echo"])


def running(server_urls: tuple[str, str], folder: Path, config: str, backends: list[str]) -> Iterator[Stack]:
    """A stack with one worker per backend."""
    path = folder / "switchyard.yaml"
    path.write_text(config)
    with contextlib.closing(redis.Redis.from_url(server_urls[1])) as client:
        client.flushdb()
    with fresh_database(server_urls[0], "switchyard_test_stack") as database:
        made = Stack(database, server_urls[1], path, folder)
        try:
            made.start_reconciler()
            made.start_gateway()
            for backend in backends:
                made.start_worker(backend, wait_s=240)
            yield made
        finally:
            made.close()


@pytest.fixture(autouse=True, scope="session")
def _settings_cache() -> None:
    settings.load.cache_clear()
