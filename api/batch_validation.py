"""Validating a batch: its whole input is read once, and becomes rows, or a list of what is wrong with it."""

from collections.abc import AsyncIterator
from typing import Any

import structlog

from api import batch_lines
from api.batch_lines import Mistake, Raw, Splitter
from catalog import Catalog
from db import batches, files
from db.batches import Batch, NewItem, Valid
from db.lanes import LONG_S, Lane

log = structlog.get_logger()

_MOST_ERRORS = 100
_PAGE_LINES = 1000


class Validator:
    """The lanes that it needs. Made inside the event loop."""

    def __init__(self, database_url: str) -> None:
        self._reads = Lane(database_url, files.read, silence_s=LONG_S)
        self._add_items = Lane(database_url, batches.add_items, silence_s=LONG_S)
        self._begins = Lane(database_url, batches.begin)
        self._fails = Lane(database_url, batches.fail, silence_s=LONG_S)

    async def close(self) -> None:
        for lane in (self._reads, self._add_items, self._begins, self._fails):
            await lane.close()

    async def validate(self, batch: Batch, served: Catalog) -> None:
        """Record the lines, or what is wrong with them. `served` is what there is for the batch's caller."""
        mistakes: list[dict[str, Any]] = []
        found: list[NewItem] = []
        seen: dict[str, int] = {}
        models: set[str] = set()
        total = 0
        async for raw in self._lines(batch, served.limits.body_bytes):
            total += 1
            if total > served.limits.batch_lines:
                most = f"The input has more than {served.limits.batch_lines} requests."
                mistakes = [Mistake("too_many_tasks", most).as_dict(None)]
                break
            try:
                custom_id, model = batch_lines.check(raw, batch.endpoint, served)
                if (first := seen.setdefault(custom_id, raw.number)) != raw.number:
                    text = f"custom_id is the same as on line {first}."
                    raise Mistake("duplicate_custom_id", text, "custom_id")
            except Mistake as mistake:
                mistakes.append(mistake.as_dict(raw.number))
                if len(mistakes) >= _MOST_ERRORS:
                    break
                continue
            models.add(model)
            found.append(NewItem(batch.id, raw.number, custom_id, model, raw.start, raw.num_bytes))
            if len(found) >= _PAGE_LINES and not mistakes:
                await self._add_items.submit(found)
                found = []
        if not total:
            mistakes = [Mistake("empty_file", "The input has no requests.").as_dict(None)]
        if mistakes:
            await self._fails.submit((batch.id, mistakes))
            log.info("batch.failed", batch_id=str(batch.id), mistakes=len(mistakes))
            return
        if found:
            await self._add_items.submit(found)
        await self._begins.submit(Valid(batch.id, total, models.pop() if len(models) == 1 else None))
        log.info("batch.begun", batch_id=str(batch.id), lines=total)

    async def _lines(self, batch: Batch, body_bytes: int) -> AsyncIterator[Raw]:
        splitter = Splitter(body_bytes)
        start = 0
        while data := await self._reads.submit((batch.input_file_id, start)):
            start += len(data)
            for raw in splitter.feed(data):
                yield raw
        for raw in splitter.end():
            yield raw
