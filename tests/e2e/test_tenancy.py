"""What one tenant owns does not exist for another: found from the tables, so that a new one needs a case here."""

import functools
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from api.app import create_app
from db.models import Base
from tests.conftest import ECHO, running
from tests.stack import Stack

pytestmark = pytest.mark.e2e

OWNED = {"tenants"}
for table in Base.metadata.sorted_tables:  # what is referred to comes first
    owners = {key.column.table.name for key in table.foreign_keys}
    if {"tenant", "api_key_id"} & set(table.columns.keys()) or owners & OWNED:
        OWNED.add(table.name)


class Address(NamedTuple):
    """How an object is asked for, and what everyone hears for whom it does not exist."""

    method: str
    path: str
    status: int = 404
    code: str | None = None


JOB = [
    Address(method, f"/v1/jobs/{{job}}{rest}", code="job_not_found")
    for method, rest in (
        ("GET", ""), ("GET", "?wait=1"), ("GET", "/stream"), ("GET", "/stream?starting_after=1"), ("GET", "/explain"), ("GET", "/events"),
        ("POST", "/cancel"), ("POST", "/retry"), ("DELETE", ""),
    )
] + [
    Address(method, f"/v1/responses/{{response}}{rest}", code="response_not_found")
    for method, rest in (
        ("GET", ""), ("GET", "?stream=true"), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", ""),
    )
]  # fmt: skip
for_admins = functools.partial(Address, status=403, code="permission_denied")
ADDRESSES: dict[str, list[Address]] = {
    "jobs": JOB,
    "job_results": [Address("GET", "/v1/jobs/{job}/result", code="job_not_found")],
    "response_cache": [Address("DELETE", "/v1/cache/{entry}", status=200)],
    "webhook_deliveries": [Address("POST", "/v1/webhooks/deliveries/{delivery}/redeliver", code="delivery_not_found")],
    "api_keys": [
        for_admins("GET", "/admin/v1/keys/{key}"),
        for_admins("PATCH", "/admin/v1/keys/{key}"),
        for_admins("POST", "/admin/v1/keys/{key}/rotate"),
        for_admins("POST", "/admin/v1/keys/{key}/revoke"),
    ],
    "tenants": [
        for_admins("GET", "/admin/v1/tenants/{tenant}"),
        for_admins("PATCH", "/admin/v1/tenants/{tenant}"),
    ],
    "files": [
        Address("GET", "/v1/files/{file}", code="file_not_found"),
        Address("DELETE", "/v1/files/{file}", code="file_not_found"),
    ],
    "file_chunks": [Address("GET", "/v1/files/{file}/content", code="file_not_found")],
    "batches": [
        Address("GET", "/v1/batches/{batch}", code="batch_not_found"),
        Address("POST", "/v1/batches/{batch}/cancel", code="batch_not_found"),
    ],
    # No route names one of these.
    "batch_items": [],
    "idempotency_keys": [],
    "budget_days": [],
    "usage_days": [],
    "usage_entries": [],
    "webhook_secrets": [],
    "webhook_gone": [],
    "request_log": [],
}
LISTS = [
    "/v1/jobs",
    "/v1/jobs?metadata%5Bwhose%5D=owner",
    "/v1/cache",
    "/v1/webhooks/deliveries",
    "/v1/webhooks/secrets",
    "/v1/files",
    "/v1/batches",
    "/v1/usage",
]
OPEN_TO_ALL = {"/v1/models/{model}"}


class Objects(NamedTuple):
    """One of each kind, by the names that the addresses use."""

    job: str
    response: str
    entry: str
    delivery: str
    key: str
    tenant: str
    file: str
    batch: str


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("tenancy"), ECHO, ["echo"])


@pytest.fixture(scope="module")
def owner(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client(stack.create_key("owner")) as client:
        yield client


@pytest.fixture
def stranger(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client(stack.create_key(f"stranger-{uuid.uuid4().hex}")) as client:
        yield client


@pytest.fixture(scope="module")
def owned(stack: Stack, owner: httpx.Client) -> Objects:
    owner.post("/v1/webhooks/secrets").raise_for_status()
    response = owner.post("/v1/responses", json={"model": "echo", "input": "mine", "background": True}).json()["id"]
    owner.post("/v1/completions", json={"model": "echo", "prompt": "mine", "temperature": 0}).raise_for_status()
    job = owner.post("/v1/jobs", json={
        "endpoint": "/v1/completions", "body": {"model": "echo", "prompt": "mine too"}, "metadata": {"whose": "owner"},
        "webhook": {"url": "https://example.invalid/"},
    }).json()["id"]  # fmt: skip
    assert owner.get(f"/v1/jobs/{job}?wait=30").json()["status"] == "succeeded"
    stack.wait_until(lambda: owner.get(f"/v1/responses/{response}").json()["status"] == "completed", "the response")
    (entry,) = stack.query("SELECT encode(key, 'hex') FROM response_cache WHERE tenant = 'owner'")[0]
    (delivery,) = stack.query("SELECT id::text FROM webhook_deliveries WHERE tenant = 'owner'")[0]
    (key,) = stack.query("SELECT id::text FROM api_keys WHERE tenant = 'owner'")[0]
    form: Any = {"files": {"file": ("lines.jsonl", b"mine")}, "data": {"purpose": "batch"}}
    file = owner.post("/v1/files", **form).json()["id"]
    batch = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    made = owner.post("/v1/batches", json=batch).json()["id"]
    return Objects(job, response, entry, delivery, key, "owner", file, made)


def nobodys() -> Objects:
    def wire(prefix: str) -> str:
        return f"{prefix}{uuid.uuid4().hex}"

    job, delivery, key = (str(uuid.uuid4()) for _ in range(3))
    return Objects(job, wire("resp_"), wire(wire("")), delivery, key, "nobody", wire("file-"), wire("batch_"))


def ask(client: httpx.Client, address: Address, objects: Objects) -> tuple[int, str, Any]:
    body: dict[str, Any] | None = {} if address.method == "PATCH" else None
    response = client.request(address.method, address.path.format(**objects._asdict()), json=body)
    return response.status_code, response.headers["content-type"], response.json()


def test_every_table_of_tenants_has_its_case() -> None:
    assert set(ADDRESSES) == OWNED


def test_every_route_to_one_object_has_its_case() -> None:
    def shape(path: str) -> str:
        return "/".join("{}" if part.startswith("{") else part for part in path.partition("?")[0].split("/"))

    asked = {(address.method, shape(address.path)) for addresses in ADDRESSES.values() for address in addresses}
    for path, methods in create_app().openapi()["paths"].items():
        for method in methods:
            if "{" in path and path not in OPEN_TO_ALL:
                assert (method.upper(), shape(path)) in asked, f"{method} {path}"


@pytest.mark.parametrize("table", [table for table, addresses in ADDRESSES.items() if addresses])
def test_anothers_and_nobodys_are_the_same(
    stack: Stack, owner: httpx.Client, stranger: httpx.Client, owned: Objects, table: str
) -> None:
    before = stack.query("SELECT id, status FROM jobs WHERE tenant = 'owner' ORDER BY id")
    for address in ADDRESSES[table]:
        status, media_type, body = ask(stranger, address, owned)
        assert (status, media_type, body) == ask(stranger, address, nobodys()), address
        assert status == address.status, (address, body)
        if address.code is None:
            assert body["removed"] == 0
        else:
            assert body["error"]["code"] == address.code
    assert stack.query("SELECT id, status FROM jobs WHERE tenant = 'owner' ORDER BY id") == before
    assert stack.query("SELECT 1 FROM response_cache WHERE key = %s", bytes.fromhex(owned.entry))
    assert owner.get(f"/v1/jobs/{owned.job}/result").status_code == 200
    assert owner.get(f"/v1/responses/{owned.response}").status_code == 200


@pytest.mark.parametrize("path", LISTS)
def test_lists_show_nothing_of_another(
    stack: Stack, owner: httpx.Client, stranger: httpx.Client, owned: Objects, path: str
) -> None:
    assert owner.get(path).json()["data"]
    assert stranger.get(path).json()["data"] == []


def test_what_is_named_in_a_body_or_a_header_is_the_callers_own(
    stack: Stack, owner: httpx.Client, stranger: httpx.Client, owned: Objects
) -> None:
    follows = {"model": "echo", "input": "and?"}
    for previous in (owned.response, nobodys().response):
        refused = stranger.post("/v1/responses", json=follows | {"previous_response_id": previous})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "previous_response_not_found")
    assert (
        stranger.post("/v1/completions", json={"model": "echo", "prompt": "mine", "temperature": 0})
        .headers["x-cache"]
        .startswith("MISS")
    )
    headers = {"Idempotency-Key": "one-for-both"}
    jobs = [client.post("/v1/completions", json={"model": "echo", "prompt": text}, headers=headers)
            for client, text in ((owner, "a"), (stranger, "b"))]  # fmt: skip
    assert [job.status_code for job in jobs] == [200, 200]
    for file in (owned.file, nobodys().file):
        batch = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        refused = stranger.post("/v1/batches", json=batch)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "file_not_found")
    assert jobs[0].headers["x-job-id"] != jobs[1].headers["x-job-id"]
    assert stranger.post("/v1/jobs/retry").json()["retried"] == 0
    owners = len(owner.get("/v1/jobs?limit=100").json()["data"])
    assert stranger.delete("/v1/jobs").json()["deleted"] <= 2
    assert len(owner.get("/v1/jobs?limit=100").json()["data"]) == owners
    assert stranger.delete("/v1/cache").json()["removed"] <= 1
    assert stack.query("SELECT 1 FROM response_cache WHERE key = %s", bytes.fromhex(owned.entry))
