"""Budgets over HTTP: many at once, processes that die, and accounts that agree with the jobs afterwards."""

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from db import session
from tests.conftest import running
from tests.db.test_budgets import accounts, truth
from tests.e2e.test_keys import error, make
from tests.stack import Stack

pytestmark = pytest.mark.e2e

CONFIG = """
backends: {echo: {runtime: echo, concurrency: 64}}
models: {echo: {path: echo, backends: [echo], price: {input: 2, output: 10}}}
"""


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("budgets"), CONFIG, ["echo"])


@pytest.fixture(scope="module")
def admin(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client(stack.create_key("operators", is_admin=True)) as client:
        yield client


def completion(max_tokens: int = 10, **options: Any) -> dict[str, Any]:
    """Of 10 prompt tokens; echo answers with as many."""
    return {"model": "echo", "prompt": "0123456789", "max_tokens": max_tokens, "options": options}


def books(stack: Stack) -> tuple[Any, Any]:
    """The accounts, once the reconciler has settled what ended, and the truth."""
    unsettled = "SELECT 1 FROM jobs WHERE reserved_tokens IS NOT NULL AND NOT is_settled AND finished_at IS NOT NULL"
    stack.wait_until(lambda: not stack.query(unsettled), "settling")
    connection = session.connect(stack.database_url, "tests")
    with connection, connection.cursor() as cursor:
        found = accounts(cursor), truth(cursor)
    connection.close()
    return found


def test_fifty_calls_at_once_do_not_overspend(stack: Stack, admin: httpx.Client) -> None:
    key = make(admin, tenant="many", limits={"daily_tokens": 20 * 20})
    with stack.client(key["key"], timeout_s=60) as client, concurrent.futures.ThreadPoolExecutor(50) as pool:
        body = completion(first_token_ms=1500)
        answers = list(pool.map(lambda _: client.post("/v1/completions", json=body), range(50)))
    served = [answer for answer in answers if answer.status_code == 200]
    assert len(served) == 20
    refused = next(answer for answer in answers if answer.status_code != 200)
    assert {error(answer) for answer in answers if answer.status_code != 200} == {(429, "insufficient_quota")}
    assert refused.headers["retry-after"] == "1"
    assert "x-should-retry" not in refused.headers
    with stack.client(key["key"]) as client:
        spent = client.post("/v1/completions", json=completion())
        assert error(spent) == (429, "insufficient_quota")
        assert spent.headers["x-should-retry"] == "false"
        assert 1 <= int(spent.headers["retry-after"]) <= 86_400
    found, expected = books(stack)
    assert found == expected
    assert [account[3] for (key_id, _), account in found.items() if str(key_id) == key["id"]] == [400]


def test_a_cost_budget_counts_in_the_models_prices(stack: Stack, admin: httpx.Client) -> None:
    # 10 tokens at 2 and 10 at 10 per million: 0.00012.
    key = make(admin, tenant="cost", limits={"daily_cost": 0.000239})
    with stack.client(key["key"]) as client:
        assert client.post("/v1/completions", json=completion()).status_code == 200
        assert error(client.post("/v1/completions", json=completion())) == (429, "insufficient_quota")
        assert client.post("/v1/completions", json=completion(max_tokens=9)).status_code == 200
    admin.patch("/admin/v1/tenants/cost", json={"limits": {"daily_cost": 0}})
    admin.patch(f"/admin/v1/keys/{key['id']}", json={"limits": {"daily_cost": None}})
    with stack.client(key["key"]) as client:
        assert error(client.post("/v1/completions", json=completion())) == (429, "insufficient_quota")


def test_a_finished_call_makes_room_at_once(stack: Stack, admin: httpx.Client) -> None:
    """No 429 that a look at the jobs would not explain: twenty in a row, one at a time."""
    key = make(admin, limits={"max_concurrent": 1})
    with stack.client(key["key"]) as client:
        for number in range(20):
            streamed = {"stream": True} if number % 2 else {}
            assert client.post("/v1/completions", json=completion() | streamed).status_code == 200
        waiting = client.post(
            "/v1/jobs", json={"endpoint": "/v1/completions", "body": completion(first_token_ms=20_000)}
        )
        assert waiting.status_code == 202
        refused = client.post("/v1/completions", json=completion())
        assert error(refused) == (429, "rate_limit_exceeded")
        assert client.post(f"/v1/jobs/{waiting.json()['id']}/cancel").status_code == 200
        assert client.post("/v1/completions", json=completion(), headers={"Idempotency-Key": "a"}).status_code == 200


def test_deaths_leave_no_drift(stack: Stack, admin: httpx.Client) -> None:
    keys = [make(admin, tenant="deaths", limits={"daily_tokens": 100_000})["key"] for _ in range(2)]
    made = []
    for secret in keys:
        with stack.client(secret) as client:
            for number in range(30):
                headers = (
                    {"Prefer": "respond-async", "Cancel-After": "3"} if number % 5 == 0 else {"Prefer": "respond-async"}
                )
                options = {"first_token_ms": 3000 if number % 4 == 0 else 50 * (number % 7)}
                fault = {"fail": "error"} if number % 6 == 0 else {}
                body = completion(10 + number, **options, **fault)
                made.append(client.post("/v1/completions", json=body, headers=headers))
    assert {answer.status_code for answer in made} == {202}
    stack.kill("echo")
    stack.kill("gateway")
    stack.start_gateway()
    with stack.client(keys[0]) as client:
        for answer in made[:30:4]:
            client.post(f"/v1/jobs/{answer.json()['id']}/cancel")
    stack.start_worker("echo")
    live = "SELECT 1 FROM jobs WHERE status IN ('queued', 'running')"
    stack.wait_until(lambda: not stack.query(live), "the end of all jobs", 60)
    ends = {status for (status,) in stack.query("SELECT DISTINCT status FROM jobs WHERE tenant = 'deaths'")}
    assert {"succeeded", "cancelled", "expired"} <= ends
    found, expected = books(stack)
    assert found == expected
    assert all(account[:3] == (0, 0, 0) for account in found.values())


def test_the_sdk_does_not_knock_again_on_an_empty_budget(stack: Stack, admin: httpx.Client) -> None:
    key = make(admin, limits={"daily_tokens": 5})
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key["key"]) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="echo", prompt="0123456789")
    assert caught.value.code == "insufficient_quota"
    count = "SELECT count(*) FROM request_log WHERE api_key_id = %s"
    stack.wait_until(lambda: stack.query(count, key["id"]) == [(1,)], "one logged request")
