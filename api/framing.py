"""What of HTTP's framing is refused beyond what the parser itself refuses: uvicorn bounds no head, takes requests
without a host, and mixes trailers into the headers."""

from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api import errors

MOST_HEAD_BYTES = 32_768
MOST_HEADERS = 100


class Framing(HttpToolsProtocol):
    """A connection that holds no more than a head's worth of what is not yet a request or a piece of its body."""

    _refusal: type[errors.APIError] = errors.InvalidHTTP
    _is_in_head = False
    _has_moved = False
    """Whether the piece of data being read began or ended something, or was part of a body."""
    _num_unread = 0
    """Bytes that came since something moved."""

    def data_received(self, data: bytes) -> None:
        self._has_moved = False
        super().data_received(data)
        self._num_unread = 0 if self._has_moved else self._num_unread + len(data)
        if self._num_unread > MOST_HEAD_BYTES and not self.transport.is_closing():
            self._refusal = errors.HeadersTooLarge
            self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what the parser refuses, here from the table of errors."""
        response = errors.render(self._refusal())
        lines = [b"HTTP/1.1 %d %s" % (response.status_code, HTTPStatus(response.status_code).phrase.encode())]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"connection: close", b"", bytes(response.body)]))
        self.transport.close()

    def on_message_begin(self) -> None:
        self._is_in_head = self._has_moved = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # a trailer must not pass for a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head, self._has_moved = False, True
        self._check_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._has_moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_moved = True
        super().on_message_complete()

    def _check_head(self) -> None:
        """Raises ValueError, which makes the parser refuse the request."""
        num_bytes, num_hosts = len(self.url), 0
        for name, value in self.headers:
            num_bytes += len(name) + len(value)
            num_hosts += name == b"host"
        if num_bytes > MOST_HEAD_BYTES or len(self.headers) > MOST_HEADERS:
            self._refusal = errors.HeadersTooLarge
            raise ValueError("the head is too large")
        version = self.parser.get_http_version()
        if version == "0.9" or num_hosts > 1 or (version == "1.1" and not num_hosts):
            raise ValueError("the request has no version, or not one host")
