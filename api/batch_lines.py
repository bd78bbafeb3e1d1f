"""The lines of a batch: what may stand in its input, and how its output is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from api import decoding, error_forms, errors, schemas
from catalog import Catalog, LimitsEntry

_MAX_ID = 512
_ENVELOPE_BYTES = 4096
"""What a line may have around its body."""
_FIELDS = ("custom_id", "method", "url", "body")


class Mistake(Exception):
    """Why a line cannot be run: OpenAI's error of a batch, without the line's number."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param

    def as_dict(self, line: int | None) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "param": self.param, "line": line}


@dataclass(frozen=True, slots=True)
class Raw:
    """A line as it lies in the file. `text` is None where it is longer than any may be."""

    number: int
    start: int
    text: bytes | None

    @property
    def num_bytes(self) -> int:
        return len(self.text or b"")


class Splitter:
    """Cuts chunks into lines, holding no more than one line. Blank lines count and are passed over."""

    def __init__(self, body_bytes: int) -> None:
        self._most = body_bytes + _ENVELOPE_BYTES
        self._rest = bytearray()
        self._start = 0
        self._number = 0
        self._is_skipping = False

    def feed(self, chunk: bytes) -> Iterator[Raw]:
        """The lines that end in this chunk."""
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            yield from self._line(part)
            self._start += 1
        self._keep(rest)

    def end(self) -> Iterator[Raw]:
        """The last line, where the file does not end with a line feed."""
        yield from self._line(b"")

    def _line(self, part: bytes) -> Iterator[Raw]:
        self._keep(part)
        self._number += 1
        text = bytes(self._rest)
        start = self._start - len(text)
        is_too_long, self._is_skipping = self._is_skipping, False
        self._rest.clear()
        if is_too_long:
            yield Raw(self._number, start, None)
        elif text.strip():
            yield Raw(self._number, start, text)

    def _keep(self, part: bytes) -> None:
        """`_start` counts every byte, also of a line too long to be kept."""
        self._start += len(part)
        self._is_skipping = self._is_skipping or len(self._rest) + len(part) > self._most
        if self._is_skipping:
            self._rest.clear()
        else:
            self._rest += part


def check(raw: Raw, endpoint: str, catalog: Catalog) -> tuple[str, str]:
    """The custom_id and the model of a line that can be run. Raises Mistake. What is inside its body is
    judged when it is run, like any request's."""
    if raw.text is None:
        raise Mistake("line_too_long", f"The line is longer than {catalog.limits.body_bytes + _ENVELOPE_BYTES} bytes.")
    fields = decode(raw.text, catalog.limits)
    for name in _FIELDS:
        if name not in fields:
            raise Mistake("missing_required_parameter", f"{name} is required.", name)
    if unknown := fields.keys() - set(_FIELDS):
        raise Mistake("unknown_field", f"The line has {len(unknown)} fields that a request does not have.")
    custom_id, body = fields["custom_id"], fields["body"]
    if type(custom_id) is not str or not 0 < len(custom_id) <= _MAX_ID:
        raise Mistake("invalid_custom_id", f"custom_id must be a string of 1 to {_MAX_ID} characters.", "custom_id")
    if fields["method"] != "POST":
        raise Mistake("invalid_method", "method must be 'POST'.", "method")
    if fields["url"] != endpoint:
        raise Mistake("invalid_url", f"url must be the batch's endpoint, {endpoint}.", "url")
    if type(body) is not dict:
        raise Mistake("invalid_request", "body must be an object.", "body")
    known = schemas.ENDPOINTS[endpoint].model_fields["model"]
    model = body.get("model", None if known.is_required() else known.default)
    if type(model) is not str:
        raise Mistake("missing_required_parameter", "body.model must be a string.", "body.model")
    if model != "auto" and catalog.model(model) is None:
        raise Mistake("model_not_found", "The model does not exist here.", "body.model")
    return custom_id, model


def decode(text: bytes, limits: LimitsEntry) -> dict[str, Any]:
    """The object that a line holds. Raises Mistake."""
    try:
        return decoding.decode(text, limits)
    except errors.APIError as error:
        code = "invalid_json_line" if error.code == "invalid_json" else error.code
        raise Mistake(code, error.message.replace("The body", "The line")) from None


def answered(request_id: str, custom_id: str, body: bytes) -> bytes:
    """The output line of a request that succeeded; `body` is its answer's own JSON."""
    return _line(request_id, custom_id, b'{"status_code":200,"request_id":"%b","body":%b}', body)


def refused(request_id: str, custom_id: str, error: errors.APIError, endpoint: str) -> bytes:
    """The error line of a request that was answered with an error, in the form of its endpoint."""
    status, body = error.status, {"error": errors.as_dict(error)}
    if (form := error_forms.FORMS.get(endpoint)) is not None:
        status, body = form(error, request_id)
    head = b'{"status_code":%d' % status
    return _line(request_id, custom_id, head + b',"request_id":"%b","body":%b}', orjson.dumps(body))


def unanswered(request_id: str, custom_id: str, code: str, message: str) -> bytes:
    """The error line of a request that has no answer."""
    why = orjson.dumps({"code": code, "message": message})
    return b'{"id":"%b","custom_id":%b,"response":null,"error":%b}\n' % (
        request_id.encode(),
        orjson.dumps(custom_id),
        why,
    )


def _line(request_id: str, custom_id: str, response: bytes, body: bytes) -> bytes:
    name = request_id.encode()
    return b'{"id":"%b","custom_id":%b,"response":%b,"error":null}\n' % (
        name,
        orjson.dumps(custom_id),
        response % (name, body),
    )
