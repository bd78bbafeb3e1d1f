"""Files at the gateway: the lanes that carry them, and how many are on their way at once."""

import uuid
from collections.abc import AsyncIterator

import structlog
from starlette.requests import Request

from api import errors, ids, uploads
from db import files
from db.files import Chunk, Finished, StoredFile
from db.lanes import LONG_S, Lane, LaneDown

log = structlog.get_logger()

_MOST_UPLOADS = 32
"""Each holds a chunk or two in memory."""
_PIECE_BYTES = 65_536


class Files:
    """One connection for the bytes that come and one for those that go. A statement moves one chunk, so many
    transfers take turns and a slow client holds none of the connections."""

    def __init__(self, database_url: str) -> None:
        self._puts = Lane(database_url, files.put, is_durable=False, max_batch=4, silence_s=LONG_S)
        self._finishes = Lane(database_url, files.finish)
        self._drops = Lane(database_url, files.drop, silence_s=LONG_S)
        self._reads = Lane(database_url, files.read, max_batch=4, silence_s=LONG_S)
        self.views = Lane(database_url, files.view)
        self.pages = Lane(database_url, files.find, silence_s=LONG_S)
        self.deletes = Lane(database_url, files.delete, max_batch=1, silence_s=LONG_S)
        self._num_uploads = 0

    async def close(self) -> None:
        for lane in [value for value in vars(self).values() if isinstance(value, Lane)]:
            await lane.close()

    async def upload(self, request: Request, tenant: str, max_bytes: int) -> StoredFile:
        """Take the file of a form. Raises APIError; what was stored of a refused one is removed."""
        if self._num_uploads >= _MOST_UPLOADS:
            raise errors.TooManyUploads()
        file_id = ids.uuid7()

        async def put(start: int, data: bytes) -> None:
            await self._puts.submit(Chunk(file_id, tenant, start, data))

        self._num_uploads += 1
        try:
            made = await uploads.receive(request, put, max_bytes)
            if not made.num_bytes:
                raise errors.InvalidValue("The file is empty.", param="file")
            kept = Finished(file_id, made.filename, made.purpose, made.num_bytes, made.ttl_s)
            stored = await self._finishes.submit(kept)
            if stored is None:
                raise errors.DependencyUnavailable("The upload took too long; send the file again.")
        except LaneDown:
            raise errors.DependencyUnavailable() from None
        except BaseException:
            self._drops.send(file_id)
            raise
        finally:
            self._num_uploads -= 1
        log.info("file.stored", file_id=str(file_id), num_bytes=stored.num_bytes)
        return stored

    async def content(self, file_id: uuid.UUID, num_bytes: int) -> AsyncIterator[bytes]:
        """The file's bytes in small pieces. Raises where they end before `num_bytes`: an answer that has begun
        can only be cut off."""
        start = 0
        while start < num_bytes:
            data = await self._reads.submit((file_id, start))
            if not data:
                raise errors.FileNotFound("The file was deleted while it was read.")
            start += len(data)
            for place in range(0, len(data), _PIECE_BYTES):
                yield data[place : place + _PIECE_BYTES]
