"""Usage over HTTP: what each key asked for, by its own tenant and by an admin."""

import datetime
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import running
from tests.e2e.test_cli import switchyard
from tests.e2e.test_keys import error
from tests.stack import Stack

pytestmark = pytest.mark.e2e

CONFIG = """
backends: {echo: {runtime: echo, concurrency: 8}}
models: {echo: {path: echo, backends: [echo], price: {input: 2, output: 10}}}
"""
BODY = {"model": "echo", "prompt": "0123456789", "max_tokens": 10, "temperature": 0}


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("usage"), CONFIG, ["echo"])


def usage(client: httpx.Client, **params: Any) -> list[dict[str, Any]]:
    answer = client.get("/v1/usage", params=params)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def test_what_a_tenant_used_is_seen_by_it_and_by_admins(stack: Stack) -> None:
    name = f"busy-{uuid.uuid4().hex}"
    with (
        stack.client(stack.create_key(name)) as busy,
        stack.client(stack.create_key("idle")) as idle,
        stack.client(stack.create_key("operators", is_admin=True)) as admin,
    ):
        for _ in range(3):
            busy.post("/v1/completions", json=BODY).raise_for_status()
        job = busy.post("/v1/jobs", json={
            "endpoint": "/v1/completions", "body": {**BODY, "prompt": "x", "options": {"first_token_ms": 60_000}},
        }).json()["id"]  # fmt: skip
        busy.post(f"/v1/jobs/{job}/cancel").raise_for_status()
        stack.wait_until(lambda: usage(busy)[0]["num_requests"] == 4, "all of them")
        (sum_,) = usage(busy, group_by="day,model")
        assert (sum_["object"], sum_["model"]) == ("usage", "echo")
        assert sum_["day"] == datetime.datetime.now(datetime.UTC).date().isoformat()
        assert (sum_["num_succeeded"], sum_["num_cached"], sum_["num_cancelled"]) == (1, 2, 1)
        assert (sum_["prompt_tokens"], sum_["completion_tokens"], sum_["total_tokens"]) == (10, 10, 20)
        assert sum_["cost"] == pytest.approx(0.00012)
        assert usage(idle) == []
        assert error(idle.get("/v1/usage", params={"tenant": name})) == (403, "permission_denied")
        assert error(idle.get("/v1/usage", params={"tenant": "nobody"})) == (403, "permission_denied")
        tenants = {one["tenant"] for one in usage(admin, group_by="tenant")}
        assert name in tenants
        assert "idle" not in tenants
        assert usage(admin, tenant="idle") == []


@pytest.mark.parametrize(
    "params",
    [
        {"start_date": "2026-02-01", "end_date": "2026-01-01"},
        {"start_date": "2020-01-01", "end_date": "2026-01-01"},
        {"start_date": "yesterday"},
        {"group_by": "hour"},
        {"group_by": "day,day"},
        {"group_by": ""},
        {"api_key_id": "x"},
        {"model": "\x00"},
        {"limit": 0},
    ],
)
def test_what_cannot_be_summed_is_refused(stack: Stack, params: dict[str, Any]) -> None:
    with stack.client() as client:
        assert client.get("/v1/usage", params=params).status_code == 400


def test_the_command_prints_what_the_route_says(stack: Stack) -> None:
    with stack.client(stack.create_key("printed")) as client:
        client.post("/v1/completions", json=BODY).raise_for_status()
    printed = switchyard(stack, "usage", "--tenant", "printed", "--by", "tenant,model", "--json")
    assert '"num_succeeded": 1' in printed
    assert '"prompt_tokens": 10' in printed
