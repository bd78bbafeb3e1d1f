"""An upload, from the wire into the ledger piece by piece: no more than a chunk of it is ever in memory.

The body is read only as fast as Postgres takes it. What is wrong with a form is said as soon as it is seen.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from api import errors
from db.files import CHUNK_BYTES

_FORM_BYTES = 65_536
"""Room for everything in a form that is not the file."""
_FIELD_BYTES = 1024
_MOST_PARTS = 16
_IDLE_S = 30.0
_FIELDS = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
_PLAIN = {b"", b"7bit", b"8bit", b"binary"}
_TTL_S = range(3600, 2_592_001)
DEFAULT_TTL_S = 2_592_000
"""OpenAI's for the files of batches: thirty days."""


@dataclass(frozen=True, slots=True)
class Upload:
    """What a form said about the file whose bytes are stored by now."""

    filename: str
    purpose: str
    num_bytes: int
    ttl_s: int


async def receive(request: Request, put: Callable[[int, bytes], Awaitable[None]], max_bytes: int) -> Upload:
    """Read a form with one file, handing its bytes to `put` (start, bytes). Raises APIError, or
    ClientDisconnect where the client has sent nothing for half a minute."""
    form = _Form(_boundary(request, max_bytes))
    stored = 0
    async for piece in _pieces(request):
        form.feed(piece)
        while len(form.data) >= CHUNK_BYTES:
            await put(stored, bytes(form.data[:CHUNK_BYTES]))
            del form.data[:CHUNK_BYTES]
            stored += CHUNK_BYTES
        if stored + len(form.data) > max_bytes:
            raise _too_large(max_bytes)
    if not form.is_whole:
        raise errors.InvalidRequest("The form is not whole: its closing boundary is missing.")
    if form.filename is None:
        raise errors.InvalidValue("file is required.", param="file")
    upload = Upload(form.filename, _purpose(form.fields), stored + len(form.data), _ttl_s(form.fields))
    if form.data:
        await put(stored, bytes(form.data))
    return upload


def _boundary(request: Request, max_bytes: int) -> bytes:
    headers = request.headers
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise errors.UnsupportedContentEncoding()
    media_type, options = parse_options_header(headers.get("content-type", ""))
    if media_type != b"multipart/form-data":
        raise errors.UnsupportedMediaType("Content-Type must be multipart/form-data.")
    declared = headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 15 or int(declared) > max_bytes + _FORM_BYTES):
        raise _too_large(max_bytes)
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= 70:
        raise errors.InvalidRequest("Content-Type must name a boundary of 1 to 70 characters.")
    return boundary


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(_IDLE_S):
                piece = await anext(stream, None)
        except TimeoutError:
            raise ClientDisconnect from None
        if piece is None:
            return
        yield piece


@dataclass(slots=True)
class _Part:
    header: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str | None = None
    """None: the file."""
    text: bytearray = field(default_factory=bytearray)


class _Form:
    """What the parser has seen: fields whole, the file's bytes until somebody takes them."""

    def __init__(self, boundary: bytes) -> None:
        self.data = bytearray()
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.is_whole = False
        self._part = _Part()
        self._num_parts = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._part.header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._part.value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._describe,
                "on_part_data": self._take,
                "on_part_end": self._end,
                "on_end": self._close,
            },
        )

    def feed(self, piece: bytes) -> None:
        try:
            self._parser.write(piece)
        except FormParserError:
            raise errors.InvalidRequest("The body is not a well-formed multipart form.") from None

    def _begin(self) -> None:
        self._part = _Part()
        self._num_parts += 1
        if self._num_parts > _MOST_PARTS:
            raise errors.InvalidRequest(f"The form has more than {_MOST_PARTS} parts.")

    def _end_header(self) -> None:
        part = self._part
        part.headers[bytes(part.header).lower()] = bytes(part.value)
        part.header.clear()
        part.value.clear()

    def _describe(self) -> None:
        part = self._part
        if part.headers.get(b"content-transfer-encoding", b"").strip().lower() not in _PLAIN:
            raise errors.UnsupportedContentEncoding("The parts of a form must not be encoded.")
        kind, options = parse_options_header(part.headers.get(b"content-disposition", b""))
        name = options.get(b"name")
        if kind != b"form-data" or name is None:
            raise errors.InvalidRequest("A part of the form has no name.")
        if name == b"file":
            if self.filename is not None:
                raise errors.DuplicateKey("The form has more than one file.", param="file")
            if b"filename" not in options:
                raise errors.InvalidValue("file must be a file with a name.", param="file")
            self.filename = _filename(options[b"filename"])
            return
        part.name = name.decode("latin-1")
        if part.name not in _FIELDS:
            raise errors.UnknownField("The form has a field that this endpoint does not know.")
        if part.name in self.fields:
            raise errors.DuplicateKey("The form has a field twice.", param=part.name)

    def _take(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.name is None:
            self.data += data[start:end]
            return
        part.text += data[start:end]
        if len(part.text) > _FIELD_BYTES:
            raise errors.InvalidValue(f"{part.name} is too long.", param=part.name)

    def _end(self) -> None:
        part = self._part
        if part.name is None:
            return
        try:
            self.fields[part.name] = part.text.decode()
        except UnicodeDecodeError:
            raise errors.InvalidEncoding("A field of the form is not UTF-8.", param=part.name) from None
        if part.name == "purpose":
            _purpose(self.fields)

    def _close(self) -> None:
        self.is_whole = True


def _filename(raw: bytes) -> str:
    """The last part of the path, which is all that browsers and clients mean."""
    try:
        name = re.split(r"[/\\]", raw.decode())[-1].strip()
    except UnicodeDecodeError:
        raise errors.InvalidEncoding("The file's name is not UTF-8.", param="file") from None
    if not 0 < len(name) <= 255 or not name.isprintable():
        raise errors.InvalidValue("The file's name must have 1 to 255 printable characters.", param="file")
    return name


def _purpose(fields: dict[str, str]) -> str:
    if "purpose" not in fields:
        raise errors.InvalidValue("purpose is required.", param="purpose")
    if fields["purpose"] != "batch":
        raise errors.InvalidValue("purpose must be 'batch'.", param="purpose")
    return "batch"


def _ttl_s(fields: dict[str, str]) -> int:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return DEFAULT_TTL_S
    if anchor != "created_at":
        raise errors.InvalidValue("expires_after.anchor must be 'created_at'.", param="expires_after.anchor")
    if seconds is None or not re.fullmatch(r"[0-9]{1,8}", seconds) or int(seconds) not in _TTL_S:
        limits = f"expires_after.seconds must be from {_TTL_S.start} to {_TTL_S.stop - 1}."
        raise errors.NumberOutOfRange(limits, param="expires_after.seconds")
    return int(seconds)


def _too_large(max_bytes: int) -> errors.APIError:
    return errors.PayloadTooLarge(f"The file is larger than {max_bytes} bytes.", param="file")
