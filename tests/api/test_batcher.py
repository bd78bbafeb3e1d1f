"""The batcher's own bookkeeping, over a real database; what it does to jobs is in tests/e2e."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from api.batcher import Batcher
from db import api_keys, batches, files, session
from db.batches import NewBatch, NewItem
from db.files import Chunk, Finished
from db.session import Cursor
from settings import Settings
from tests.stack import fresh_database

CONFIG = """
backends: {nobody: {runtime: echo}}
models: {m: {path: m, backends: [nobody]}}
"""
NUM_LINES = 20
LINES = [
    {"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}
    for n in range(NUM_LINES)
]


@pytest.fixture
def config(server_urls: tuple[str, str], tmp_path: Path) -> Iterator[Settings]:
    path = tmp_path / "switchyard.yaml"
    path.write_text(CONFIG)
    with fresh_database(server_urls[0], "switchyard_test_batcher") as url:
        yield Settings(config=path, home=tmp_path, models_dir=tmp_path, database_url=url, redis_url=server_urls[1])


@pytest.fixture
def cursor(config: Settings) -> Iterator[Cursor]:
    connection = session.connect(config.database_url, "tests")
    with contextlib.closing(connection), connection.cursor() as opened:
        yield opened


def validating(cursor: Cursor, key_id: uuid.UUID) -> uuid.UUID:
    content = "\n".join(map(json.dumps, LINES)).encode()
    file_id, batch_id = uuid.uuid4(), uuid.uuid4()
    files.put(cursor, [Chunk(file_id, "t", 0, content)])
    files.finish(cursor, [Finished(file_id, "x", "batch", len(content), 3600)])
    wanted = NewBatch(
        id=batch_id, tenant="t", api_key_id=key_id, endpoint="/v1/completions", input_file_id=file_id,
        completion_window="24h", window_s=86_400, metadata=None, output_ttl_s=3600,
    )  # fmt: skip
    assert batches.create(cursor, [wanted]) != [None]
    return batch_id


async def until(cursor: Cursor, batch_id: uuid.UUID, status: str) -> None:
    deadline = time.monotonic() + 60
    while (found := batches.view(cursor, [(batch_id, "t")])[0]) is None or found.status != status:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)


async def test_a_validation_that_fails_holds_up_no_other_and_is_done_again(
    config: Settings, cursor: Cursor, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = api_keys.create(cursor, "k", "t")[1]
    stuck, free = validating(cursor, key.id), validating(cursor, key.id)
    is_broken = True
    add_items = batches.add_items

    def broken(cursor: Cursor, groups: Sequence[Sequence[NewItem]]) -> Any:
        if is_broken and groups[0][0].batch_id == stuck:
            add_items(cursor, [groups[0][: NUM_LINES // 2]])
            raise RuntimeError("not now")
        return add_items(cursor, groups)

    monkeypatch.setattr("db.batches.add_items", broken)
    stop, batcher = asyncio.Event(), Batcher(config)
    running = asyncio.create_task(batcher.run(stop))
    try:
        await until(cursor, free, "in_progress")
        await until(cursor, stuck, "validating")
        is_broken = False
        await until(cursor, stuck, "in_progress")
        cursor.execute("SELECT num_total, (SELECT count(*) FROM batch_items WHERE batch_id = id) FROM batches")
        assert cursor.fetchall() == [(NUM_LINES, NUM_LINES)] * 2, "what was recorded before does not count twice"
    finally:
        stop.set()
        await running
        await batcher.close()
