"""One POST to an address that a caller named, with what such an address may not be.

A caller must not reach through us what only we can reach. So a name is resolved here, each address is
checked, and the connection goes to the checked address itself: nobody asks the name again. Redirects are
answers like any other, and of an answer only its head is read.
"""

import asyncio
import email.utils
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from urllib.parse import SplitResult, urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PRINTABLE = re.compile(r"[!-~]{1,2048}")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_MOST_HEAD = 16_384


class Refused(Exception):
    """The URL may not be called, now or later."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a receiver said."""

    status: int
    retry_after_s: float | None = None


def networks(named: str) -> tuple[Network, ...]:
    """The private networks that a setting allows, separated by commas. Raises ValueError."""
    return tuple(ipaddress.ip_network(one.strip()) for one in named.split(",") if one.strip())


def check(url: str, allowed: Sequence[Network]) -> SplitResult:
    """The parts of a URL that may be called as far as its text can tell. Raises Refused."""
    if not _PRINTABLE.fullmatch(url):
        raise Refused("must be printable ASCII of at most 2,048 characters")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise Refused("must be a URL") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise Refused("must be an http or https URL with a host")
    if "@" in parts.netloc:
        raise Refused("must not have a user or a password")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return parts
    if not is_allowed(address, allowed):
        raise Refused("must not lead into a private network")
    return parts


def is_allowed(address: _Address, allowed: Sequence[Network]) -> bool:
    """Whether an address is of the public Internet, or of a network that a setting names."""
    inner = _embedded(address)
    if inner is not None:
        return is_allowed(inner, allowed)
    if any(address in network for network in allowed):
        return True
    return address.is_global and not address.is_multicast


def _embedded(address: _Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


async def post(url: str, body: bytes, headers: Mapping[str, str], allowed: Sequence[Network],
               timeout_s: float) -> Answer:  # fmt: skip
    """Raises Refused; OSError or TimeoutError where nobody answered."""
    parts = check(url, allowed)
    async with asyncio.timeout(timeout_s):
        reader, writer = await _connect(parts, allowed)
        try:
            writer.write(_request(parts, body, headers))
            await writer.drain()
            return await _answer(reader)
        finally:
            writer.transport.abort()


async def _connect(parts: SplitResult, allowed: Sequence[Network]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, is_tls = str(parts.hostname), parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    checked = [one for one in addresses if is_allowed(ipaddress.ip_address(one.partition("%")[0]), allowed)]
    if addresses and not checked:
        raise Refused("must not lead into a private network")
    failure: OSError = OSError("the name has no address")
    for address in checked:
        try:
            return await asyncio.open_connection(
                address,
                port,
                ssl=_tls() if is_tls else None,
                server_hostname=host if is_tls else None,
                limit=_MOST_HEAD,
            )
        except OSError as error:
            failure = error
    raise failure


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _request(parts: SplitResult, body: bytes, headers: Mapping[str, str]) -> bytes:
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [
        f"POST {target} HTTP/1.1",
        f"Host: {parts.netloc}",
        *(f"{name}: {value}" for name, value in headers.items()),
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body


async def _answer(reader: asyncio.StreamReader) -> Answer:
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            raise OSError("the answer is not HTTP") from None
        lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.[01] ([1-5]\d\d)( .*)?", lines[0])
        if match is None:
            raise OSError("the answer is not HTTP")
        status = int(match[1])
        if status >= 200:
            return Answer(status, _retry_after(lines[1:]))


def _retry_after(lines: Sequence[str]) -> float | None:
    """Seconds, or a date."""
    for line in lines:
        name, _, value = line.partition(":")
        if name.lower() == "retry-after":
            value = value.strip()
            if re.fullmatch(r"\d{1,8}", value):
                return float(value)
            try:
                return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
            except (TypeError, ValueError):
                return None
    return None
