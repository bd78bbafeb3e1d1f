"""Where a webhook may lead, and what is understood of its receiver's answer."""

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Any

import openai
import pytest

from tasks import webhook_post, webhooks
from tasks.webhook_post import Refused

LOOPBACK = webhook_post.networks("127.0.0.0/8")


@pytest.mark.parametrize(
    "url",
    [
        "", "ftp://example.com/", "file:///etc/passwd", "gopher://example.com", "//example.com", "example.com", "http://",
        "http:///path", "http://user:pass@example.com/", "http://user@example.com/", "http://exa mple.com/",
        "http://example.com/\r\nX: y", "http://example.com/ü", "http://example.com:0/", "http://example.com:99999/",
        "http://[::1", "http://127.0.0.1/", "http://127.8.9.1/", "https://10.0.0.1/", "http://172.16.0.1/",
        "http://192.168.1.1/", "http://169.254.169.254/latest/meta-data", "http://100.64.0.1/", "http://0.0.0.0/",
        "http://224.0.0.1/", "http://255.255.255.255/", "http://[::1]/", "http://[::]/", "http://[fe80::1]/",
        "http://[fd00::1]/", "http://[::ffff:127.0.0.1]/", "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/",
        "http://[ff02::1]/", "http://" + "x" * 2050,
    ],
)  # fmt: skip
def test_urls_that_are_refused_by_their_text(url: str) -> None:
    with pytest.raises(Refused):
        webhook_post.check(url, ())


@pytest.mark.parametrize(
    "url",
    ["http://example.com", "https://example.com:8443/a?b=c", "http://93.184.215.14/", "http://[2606:4700::1111]/"],
)
def test_urls_that_may_be_called(url: str) -> None:
    webhook_post.check(url, ())


def test_a_setting_names_networks() -> None:
    allowed = webhook_post.networks("10.1.0.0/16, fd00::/8")
    for address, expected in (("10.1.2.3", True), ("10.2.0.1", False), ("fd00::1", True), ("::ffff:10.1.0.1", True)):
        assert webhook_post.is_allowed(ipaddress.ip_address(address), allowed) is expected
    with pytest.raises(ValueError, match="network"):
        webhook_post.networks("loopback")


# Spellings that the resolver, not the URL's text, turns into a private address.
@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1"])
async def test_a_name_that_leads_inside_is_refused_before_a_connection(host: str) -> None:
    async with receiver(b"HTTP/1.1 200 OK\r\n\r\n") as (port, seen):
        with pytest.raises(Refused):
            await webhook_post.post(f"http://{host}:{port}/", b"{}", {}, (), 5)
    assert seen == []


@contextlib.asynccontextmanager
async def receiver(answer: bytes) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that says `answer` to whatever it is sent, and keeps that."""
    seen: list[bytes] = []
    serving: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(
                next(line for line in head.split(b"\r\n") if line.startswith(b"Content-Length")).split(b" ")[1]
            )
            seen.append(head + await reader.readexactly(length))
            writer.write(answer)
            await writer.drain()
            await reader.read()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], seen
        await asyncio.gather(*[task for task in serving if task is not None])


@pytest.mark.parametrize(
    ("answer", "status", "retry_after_s"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, None),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n" + b"x" * 1_000_000, 200, None),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", 302, None),
        (b"HTTP/1.1 429 Slow Down\r\nretry-AFTER: 120\r\n\r\n", 429, 120.0),
        (b"HTTP/1.0 503 x\r\nRetry-After: soon\r\n\r\n", 503, None),
        (b"HTTP/1.0 503 x\r\nRetry-After: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n", 503, 0.0),
    ],
)
async def test_answers(answer: bytes, status: int, retry_after_s: float | None) -> None:
    async with receiver(answer) as (port, seen):
        got = await webhook_post.post(f"http://127.0.0.1:{port}/hook?a=b", b'{"a":1}', {"X-Y": "z"}, LOOPBACK, 5)
    assert (got.status, got.retry_after_s) == (status, retry_after_s)
    assert seen[0].startswith(b"POST /hook?a=b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nX-Y: z\r\n" % port)
    assert seen[0].endswith(b'\r\n\r\n{"a":1}')


async def test_a_retry_after_may_be_a_date() -> None:
    later = formatdate(time.time() + 100, usegmt=True).encode()
    async with receiver(b"HTTP/1.1 503 x\r\nRetry-After: " + later + b"\r\n\r\n") as (port, _):
        got = await webhook_post.post(f"http://127.0.0.1:{port}/", b"", {}, LOOPBACK, 5)
    assert got.retry_after_s is not None
    assert 95 < got.retry_after_s <= 100


@pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 2000 OK\r\n\r\n", b"x" * 100_000])
async def test_what_is_not_http_is_a_failure(answer: bytes) -> None:
    async with receiver(answer) as (port, _):
        with pytest.raises(OSError, match="not HTTP"):
            await webhook_post.post(f"http://127.0.0.1:{port}/", b"", {}, LOOPBACK, 5)


async def test_a_silent_receiver_is_given_up() -> None:
    async with receiver(b"HTTP/1.1 200 O") as (port, _):
        with pytest.raises(TimeoutError):
            await webhook_post.post(f"http://127.0.0.1:{port}/", b"", {}, LOOPBACK, 0.2)


def test_openais_client_verifies_either_secret() -> None:
    body: Any = '{"id":"evt_1","object":"event","type":"response.completed","created_at":1,"data":{"id":"resp_1"}}'
    old, new = "whsec_" + "b2xk" * 8, "whsec_" + "bmV3" * 8
    headers = webhooks.signed("evt_1", int(time.time()), body.encode(), [new, old])
    with openai.OpenAI(api_key="x") as client:
        for secret in (old, new):
            assert client.webhooks.unwrap(body, headers, secret=secret).type == "response.completed"
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body + " ", headers, secret=new)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body, headers, secret="whsec_" + "eHh4" * 8)
