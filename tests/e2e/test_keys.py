"""What keys may do: scopes, models, expiry, rotation, revocation; in every gateway, by command and by admin API."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import ECHO, running
from tests.e2e.test_cli import switchyard
from tests.stack import Stack, free_port

pytestmark = pytest.mark.e2e

COMPLETION = {"model": "echo", "prompt": "x"}


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("keys"), ECHO, ["echo"])


@pytest.fixture(scope="module")
def second(stack: Stack) -> str:
    """The URL of another gateway process."""
    port = free_port()
    stack.start_gateway("gateway2", port)
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def admin(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client(stack.create_key("operators", is_admin=True)) as client:
        yield client


def make(admin: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = admin.post("/admin/v1/keys", json={"name": "made", "tenant": "t", **fields})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize(
    ("scope", "allowed"), [("submit", {"submit"}), ("read", {"read"}), ("cancel", {"cancel"}), ("admin", set())]
)
def test_a_key_does_what_its_scopes_say_and_no_more(
    stack: Stack, admin: httpx.Client, scope: str, allowed: set[str]
) -> None:
    nobody = uuid.uuid4()
    calls = {
        "submit": [("POST", "/v1/completions"), ("POST", "/v1/jobs"), ("POST", f"/v1/jobs/{nobody}/retry"),
                   ("POST", "/v1/tokenize")],
        "read": [("GET", "/v1/models"), ("GET", "/v1/jobs"), ("GET", f"/v1/jobs/{nobody}/result"), ("GET", "/metrics")],
        "cancel": [("POST", f"/v1/jobs/{nobody}/cancel"), ("DELETE", "/v1/cache"), ("DELETE", "/v1/jobs")],
    }  # fmt: skip
    with stack.client(make(admin, scopes=[scope])["key"]) as client:
        for needed, requests in calls.items():
            for method, path in requests:
                response = client.request(method, path, json={} if method == "POST" else None)
                if needed in allowed:
                    assert response.status_code not in (401, 403), path
                else:
                    assert error(response) == (403, "permission_denied"), path
                    assert needed in response.json()["error"]["message"]
        assert (client.get("/admin/v1/keys").status_code == 200) == (scope == "admin")


def test_a_model_outside_the_scope_does_not_exist(stack: Stack, admin: httpx.Client) -> None:
    with stack.client() as whole:
        cached = {"model": "echo", "prompt": "for whoever may", "temperature": 0}
        for _ in range(2):
            assert whole.post("/v1/completions", json=cached).status_code == 200
    tenant = "default"
    spare, asleep = (make(admin, models=[name], tenant=tenant)["key"] for name in ("other", "asleep"))
    with stack.client(spare) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["spare"]
        unknown = client.post("/v1/completions", json=COMPLETION | {"model": "no-such-model"}).json()["error"]
        for name in ("echo", "asleep"):
            assert client.get(f"/v1/models/{name}").status_code == 404
            for path, body in [
                ("/v1/completions", cached | {"model": name}),
                ("/v1/tokenize", COMPLETION | {"model": name}),
                ("/v1/detokenize", {"model": name, "tokens": [65]}),
            ]:
                response = client.post(path, json=body)
                assert response.status_code == 404
                assert response.json()["error"] == unknown
            turns: dict[str, object] = {"model": name, "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
            others: list[tuple[str, str, dict[str, object] | None]] = [
                ("POST", "/v1/messages", turns),
                ("POST", "/v1/messages/count_tokens", {"model": name, "messages": turns["messages"]}),
                ("POST", "/v1/responses", {"model": name, "input": "x"}),
                ("POST", "/embed", {"model": name, "inputs": "x"}),
                ("GET", f"/info?model={name}", None),
            ]
            for method, path, asked in others:
                assert client.request(method, path, json=asked).status_code == 404, path
        response = client.post("/v1/completions", json=COMPLETION | {"model": "auto"})
        assert error(response) == (503, "model_unavailable")
    with stack.client(asleep) as client:
        # Its fallback is outside the scope.
        assert error(client.post("/v1/completions", json=COMPLETION | {"model": "asleep"})) == (
            503,
            "model_unavailable",
        )


def test_a_revocation_reaches_every_gateway_within_two_seconds(stack: Stack, admin: httpx.Client, second: str) -> None:
    key = make(admin)
    headers = {"Authorization": f"Bearer {key['key']}"}
    urls = [f"{url}/v1/models" for url in (stack.url, second)]
    for url in urls:
        assert httpx.get(url, headers=headers).status_code == 200
    revoked_at = time.monotonic()
    assert admin.post(f"/admin/v1/keys/{key['id']}/revoke").json()["state"] == "revoked"
    refused: dict[str, float] = {}
    while len(refused) < len(urls):
        assert time.monotonic() - revoked_at < 2.0, f"still served by {set(urls) - set(refused)}"
        for url in urls:
            if httpx.get(url, headers=headers).status_code == 401:
                refused.setdefault(url, time.monotonic() - revoked_at)
    assert error(admin.post(f"/admin/v1/keys/{key['id']}/revoke")) == (404, "key_not_found")


def test_after_a_rotation_the_old_secret_goes_on_for_the_grace_only(stack: Stack, admin: httpx.Client) -> None:
    key = make(admin)
    rotated = admin.post(f"/admin/v1/keys/{key['id']}/rotate", params={"grace_s": 3600}).json()
    assert rotated["id"] == key["id"]
    assert rotated["key"] != key["key"]
    for secret in (key["key"], rotated["key"]):
        with stack.client(secret) as client:
            assert client.get("/v1/models").status_code == 200
    again = json.loads(switchyard(stack, "keys", "rotate", key["id"], "--grace", "0", "--json"))
    with stack.client(again["key"]) as client:
        assert client.get("/v1/models").status_code == 200
    for secret in (key["key"], rotated["key"]):
        with stack.client(secret) as client:
            stack.wait_until(lambda c=client: c.get("/v1/models").status_code == 401, "refusal of the old secret", 3)  # type: ignore[misc]


def test_a_key_expires_and_its_scopes_change_under_it(stack: Stack, admin: httpx.Client) -> None:
    key = make(admin, scopes=["read"])
    with stack.client(key["key"]) as client:
        assert client.get("/v1/models").status_code == 200
        changed = admin.patch(f"/admin/v1/keys/{key['id']}", json={"scopes": ["cancel"], "models": ["echo"]}).json()
        assert (changed["scopes"], changed["models"]) == (["cancel"], ["echo"])
        stack.wait_until(lambda: client.get("/v1/models").status_code == 403, "the new scopes", 3)
        admin.patch(f"/admin/v1/keys/{key['id']}", json={"expires_at": int(time.time()) - 1})
        stack.wait_until(lambda: client.get("/v1/models").status_code == 401, "the end of the key", 3)
    assert admin.get(f"/admin/v1/keys/{key['id']}").json()["state"] == "expired"
    assert error(admin.patch(f"/admin/v1/keys/{key['id']}", json={})) == (404, "key_not_found")


def test_the_admin_api_is_for_admins(stack: Stack, admin: httpx.Client) -> None:
    with stack.client() as client:
        for method, path in [("GET", "/admin/v1/keys"), ("POST", "/admin/v1/keys"), ("GET", "/admin/v1/tenants")]:
            assert error(client.request(method, path)) == (403, "permission_denied")
    assert error(admin.get(f"/admin/v1/keys/{uuid.uuid4()}")) == (404, "key_not_found")
    assert error(admin.get("/admin/v1/tenants/nobody")) == (404, "tenant_not_found")
    assert error(admin.patch("/admin/v1/tenants/-bad", json={})) == (400, "validation_error")
    made = admin.patch("/admin/v1/tenants/acme", json={"weight": 2.5, "limits": {"daily_cost": 1.5}}).json()
    assert (made["weight"], made["limits"]["daily_cost"]) == (2.5, 1.5)
    assert admin.patch("/admin/v1/tenants/acme", json={"weight": 3}).json()["limits"]["daily_cost"] == 1.5
    assert admin.get("/admin/v1/tenants/acme").json()["weight"] == 3
    assert "acme" in [tenant["name"] for tenant in admin.get("/admin/v1/tenants").json()["data"]]
    secret = make(admin, tenant="acme")["key"]
    listed = admin.get("/admin/v1/keys", params={"tenant": "acme"})
    assert [key["tenant"] for key in listed.json()["data"]] == ["acme"]
    assert secret not in listed.text


def test_where_it_is_switched_off_the_admin_api_is_not_there(stack: Stack, admin: httpx.Client) -> None:
    port = free_port()
    stack.start_gateway("gateway3", port, SWITCHYARD_ADMIN_API="off")
    response = httpx.get(f"http://127.0.0.1:{port}/admin/v1/keys", headers=dict(admin.headers))
    assert error(response) == (404, "not_found")


def test_the_sdk_sees_a_missing_scope_as_permission_denied(stack: Stack, admin: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=make(admin, scopes=["read"])["key"]) as client:
        assert [model.id for model in client.models.list()]
        with pytest.raises(openai.PermissionDeniedError):
            client.completions.create(model="echo", prompt="x")


def test_the_same_by_command(stack: Stack) -> None:
    made = json.loads(switchyard(stack, "keys", "create", "--name", "narrow", "--scopes", "read,cancel", "--models", "echo",
                                 "--daily-tokens", "1000", "--daily-cost", "0.5", "--json"))  # fmt: skip
    listed = {key["id"]: key for key in json.loads(switchyard(stack, "keys", "list", "--json"))}[made["id"]]
    assert (listed["scopes"], listed["models"]) == (["read", "cancel"], ["echo"])
    assert (listed["limits"]["daily_tokens"], listed["limits"]["daily_cost"]) == (1000, 0.5)
    switchyard(stack, "keys", "set", made["id"], "--daily-tokens", "none", "--models", "all", "--scopes", "submit")
    listed = {key["id"]: key for key in json.loads(switchyard(stack, "keys", "list", "--json"))}[made["id"]]
    assert (listed["scopes"], listed["models"], listed["limits"]["daily_tokens"]) == (["submit"], None, None)
    assert "--scopes takes" in switchyard(stack, "keys", "set", made["id"], "--scopes", "everything", status=1)
    assert "whole number" in switchyard(stack, "keys", "set", made["id"], "--daily-tokens", "many", status=1)
    switchyard(stack, "tenants", "set", "by-command", "--weight", "3", "--max-concurrent", "5")
    tenants = {one["name"]: one for one in json.loads(switchyard(stack, "tenants", "list", "--json"))}
    assert (tenants["by-command"]["weight"], tenants["by-command"]["limits"]["max_concurrent"]) == (3.0, 5)
