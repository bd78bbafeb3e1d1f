"""Files over the wire: what goes in comes out, byte for byte, and what is wrong with a form is said."""

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.conftest import running
from tests.stack import Stack

pytestmark = pytest.mark.e2e

CONFIG = """
backends: {echo: {runtime: echo}}
models: {echo: {path: echo, backends: [echo]}}
limits: {file_bytes: 60000000}
"""
MAX_BYTES = 60_000_000
FORM = {"Content-Type": "multipart/form-data; boundary=b0undary"}


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("files"), CONFIG, [])


def part(name: str, value: bytes, more: str = "") -> bytes:
    head = f'--b0undary\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + value + b"\r\n"


FILE = part("file", b"MARKER", '; filename="a.jsonl"')
PURPOSE = part("purpose", b"batch")
END = b"--b0undary--\r\n"
ANCHOR = part("expires_after[anchor]", b"created_at")


def stored(stack: Stack) -> Any:
    return stack.query("SELECT (SELECT count(*) FROM files), (SELECT count(*) FROM file_chunks)")


def test_the_openai_client_stores_lists_reads_and_deletes(stack: Stack, tmp_path: Path) -> None:
    content = hashlib.shake_128(b"seed").digest(3_500_000)
    path = tmp_path / "größe.jsonl"
    path.write_bytes(content)
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret, max_retries=0) as client:
        expiry: Any = {"anchor": "created_at", "seconds": 3600}
        made = client.files.create(file=path, purpose="batch", expires_after=expiry)
        assert (made.bytes, made.filename, made.purpose, made.status, made.object) == (
            3_500_000, "größe.jsonl", "batch", "processed", "file",
        )  # fmt: skip
        assert made.expires_at == made.created_at + 3600
        assert client.files.retrieve(made.id) == made
        assert client.files.content(made.id).read() == content
        second = client.files.create(file=("x", b"1"), purpose="batch")
        assert [one.id for one in client.files.list(limit=1)] == [second.id, made.id], "the pages follow each other"
        assert [one.id for one in client.files.list(order="asc", purpose="batch")] == [made.id, second.id]
        assert client.files.list(purpose="batch_output").data == []
        assert client.files.delete(made.id).deleted
        for read in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                read(made.id)
        client.files.delete(second.id)
    assert stored(stack) == [(0, 0)]


def test_a_strangers_file_is_unknown(stack: Stack) -> None:
    with stack.client() as client, stack.client(stack.create_key("stranger")) as other:
        made = client.post("/v1/files", files={"file": ("x", b"1")}, data={"purpose": "batch"}).json()
        unknown = other.get("/v1/files/file-" + "0" * 32)
        assert unknown.json()["error"]["code"] == "file_not_found"
        for path in (f"/v1/files/{made['id']}", f"/v1/files/{made['id']}/content", "/v1/files/nonsense"):
            assert (other.get(path).status_code, other.get(path).content) == (404, unknown.content)
        assert other.delete(f"/v1/files/{made['id']}").status_code == 404
        assert other.get("/v1/files").json()["data"] == []
        assert client.delete(f"/v1/files/{made['id']}").status_code == 200


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_request", None),
        (b"MARKER", "invalid_request", None),
        (PURPOSE + FILE, "invalid_request", None),
        (PURPOSE + FILE[:-3], "invalid_request", None),
        (PURPOSE + FILE + b"--b0undary", "invalid_request", None),
        (b"--b0undary\r\nMARKER\r\n\r\nx\r\n" + END, "invalid_request", None),
        (b"--b0undary\r\nX: MARKER\r\n\r\nx\r\n" + END, "invalid_request", None),
        (b"--b0undary\r\n" + b"X: MARKER\r\n" * 9 + b"\r\nx\r\n" + END, "invalid_request", None),
        (b"--b0undary\r\nX: " + b"MARKER" * 2000 + b"\r\n\r\nx\r\n" + END, "invalid_request", None),
        (FILE + END, "validation_error", "purpose"),
        (PURPOSE + END, "validation_error", "file"),
        (PURPOSE + part("file", b"MARKER") + END, "validation_error", "file"),
        (PURPOSE + part("file", b"", '; filename="a"') + END, "validation_error", "file"),
        (PURPOSE + part("file", b"x", '; filename=""') + END, "validation_error", "file"),
        (PURPOSE + part("file", b"x", '; filename="MARKER\x01"') + END, "validation_error", "file"),
        (PURPOSE + part("file", b"x", f'; filename="{"MARKER" * 50}"') + END, "validation_error", "file"),
        (PURPOSE + FILE.replace(b"a.jsonl", b"\xff") + END, "invalid_encoding", "file"),
        (PURPOSE + FILE + FILE + END, "duplicate_key", "file"),
        (PURPOSE + PURPOSE + FILE + END, "duplicate_key", "purpose"),
        (part("purpose", b"MARKER") + FILE + END, "validation_error", "purpose"),
        (FILE + part("purpose", b"assistants") + END, "validation_error", "purpose"),
        (part("purpose", b"\xff") + FILE + END, "invalid_encoding", "purpose"),
        (part("purpose", b"x" * 2000) + FILE + END, "validation_error", "purpose"),
        (PURPOSE + part("MARKER", b"x") + FILE + END, "unknown_field", None),
        (PURPOSE + FILE.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n") + END,
         "unsupported_content_encoding", None),
        (PURPOSE + part("expires_after[seconds]", b"3600") + FILE + END, "validation_error", "expires_after.anchor"),
        (PURPOSE + ANCHOR + FILE + END, "number_out_of_range", "expires_after.seconds"),
        *[(PURPOSE + ANCHOR + part("expires_after[seconds]", value) + FILE + END, "number_out_of_range",
           "expires_after.seconds") for value in (b"3599", b"2592001", b"-1", b"1e9", "４０００".encode(), b"")],
    ],
)  # fmt: skip
def test_bad_forms_are_refused_and_store_nothing(stack: Stack, body: bytes, code: str, param: str | None) -> None:
    with stack.client() as client:
        response = client.post("/v1/files", content=body, headers=FORM)
    error = response.json()["error"]
    assert (response.status_code in (400, 415), error["code"], error["param"]) == (True, code, param)
    assert "MARKER" not in response.text
    stack.wait_until(lambda: stored(stack) == [(0, 0)], "no rows left")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json"}, 415),
        ({"Content-Type": "multipart/mixed; boundary=b0undary"}, 415),
        ({"Content-Type": "multipart/form-data"}, 400),
        ({"Content-Type": "multipart/form-data; boundary=" + "b" * 71}, 400),
        (FORM | {"Content-Encoding": "gzip"}, 415),
    ],
)
def test_only_plain_forms_are_read(stack: Stack, headers: dict[str, str], status: int) -> None:
    with stack.client() as client:
        response = client.post("/v1/files", content=PURPOSE + FILE + END, headers=headers)
    assert response.status_code == status
    assert stored(stack) == [(0, 0)]


def test_too_large_is_said_before_it_is_read(stack: Stack) -> None:
    with socket.create_connection(("127.0.0.1", stack.port)) as client:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {stack.secret}\r\n"
        head += f"Content-Type: {FORM['Content-Type']}\r\nContent-Length: 300000000\r\n\r\n"
        client.sendall(head.encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 413")


def test_too_large_without_a_declared_length_is_noticed_on_the_way(stack: Stack) -> None:
    def body() -> Iterator[bytes]:
        yield PURPOSE + part("file", b"", '; filename="a"')[:-2]
        for _ in range(MAX_BYTES // 1_000_000 + 2):
            yield b"x" * 1_000_000

    with stack.client() as client:
        response = client.post("/v1/files", content=body(), headers=FORM)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")
    stack.wait_until(lambda: stored(stack) == [(0, 0)], "no rows left")


def test_a_client_that_hangs_up_leaves_nothing_behind(stack: Stack) -> None:
    with socket.create_connection(("127.0.0.1", stack.port)) as client:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {stack.secret}\r\n"
        head += f"Content-Type: {FORM['Content-Type']}\r\nContent-Length: 50000000\r\n\r\n"
        client.sendall(head.encode() + PURPOSE + part("file", b"", '; filename="a"')[:-2] + b"x" * 4_000_000)
        stack.wait_until(lambda: stack.query("SELECT count(*) FROM file_chunks")[0][0] > 2, "chunks on their way")
        with stack.client() as other:
            assert other.get("/v1/files").json()["data"] == [], "nobody sees a file that is not whole"
    stack.wait_until(lambda: stored(stack) == [(0, 0)], "no rows left")


def test_large_files_pass_through_without_being_held(stack: Stack) -> None:
    block = hashlib.shake_128(b"block").digest(1_000_003)
    size = 55 * len(block)
    gateway = psutil.Process(stack.processes["gateway"].pid)
    before = gateway.memory_info().rss

    def body() -> Iterator[bytes]:
        yield PURPOSE + part("file", b"", '; filename="a"')[:-2]
        for _ in range(55):
            yield block
        yield b"\r\n" + END

    with stack.client(timeout_s=60) as client:
        made = client.post("/v1/files", content=body(), headers=FORM).json()
        assert made["bytes"] == size
        wanted = hashlib.sha256(block * 55).hexdigest()
        read = hashlib.sha256()
        with client.stream("GET", f"/v1/files/{made['id']}/content") as response:
            assert response.headers["content-length"] == str(size)
            for piece in response.iter_bytes():
                read.update(piece)
        assert read.hexdigest() == wanted
        assert client.delete(f"/v1/files/{made['id']}").status_code == 200
    assert gateway.memory_info().rss - before < 30_000_000, "half of the file at most, were it held"
