"""Rates over HTTP: what is refused, what every answer says of limits, two gateways, and no Redis."""

import re
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import ECHO, running
from tests.e2e.test_keys import error, make
from tests.faults.proxy import Mode, Proxy
from tests.stack import Stack, free_port

pytestmark = pytest.mark.e2e

SIX = [f"x-ratelimit-{name}-{unit}" for name in ("limit", "remaining", "reset") for unit in ("requests", "tokens")]
CACHED = {"model": "echo", "prompt": "in the cache", "temperature": 0}


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("rates"), ECHO, ["echo"])


@pytest.fixture(scope="module")
def admin(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client(stack.create_key("operators", is_admin=True)) as client:
        yield client


@pytest.fixture(scope="module")
def proxy(stack: Stack) -> Iterator[Proxy]:
    """Between a gateway of its own and Redis."""
    made = Proxy(int(stack.redis_url.rsplit(":", 1)[1].split("/")[0]))
    yield made
    made.close()


@pytest.fixture(scope="module")
def second(stack: Stack, proxy: Proxy) -> str:
    """The URL of the gateway behind the proxy."""
    port = free_port()
    redis_url = re.sub(r":\d+/", f":{proxy.port}/", stack.redis_url)
    stack.start_gateway("gateway2", port, SWITCHYARD_REDIS_URL=redis_url)
    return f"http://127.0.0.1:{port}"


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "echo", "prompt": "x", "max_tokens": 1, **fields}


def test_every_answer_to_a_limited_key_tells_of_its_limits(stack: Stack, admin: httpx.Client) -> None:
    limits = {"requests_per_minute": 6, "tokens_per_minute": 1000, "max_concurrent": 5, "daily_tokens": 9000}
    with stack.client(make(admin, tenant="told", limits=limits)["key"]) as client:
        fresh = client.get("/v1/models")
        assert {fresh.headers[name] for name in SIX if "reset" in name} == {"0ms"}
        answers = [
            client.post("/v1/completions", json=completion()),
            client.post("/v1/completions", json=completion(stream=True)),
            client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": completion()}),
            *(client.post("/v1/completions", json=CACHED) for _ in range(2)),
            client.post("/v1/completions", json=completion(n=99)),
            client.get(f"/v1/jobs/{uuid.uuid4()}"),
            client.post("/v1/completions", json=completion()),
            client.post("/v1/completions", json=completion()),
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 202, 200, 200, 400, 404, 200, 429]
        assert answers[4].headers["x-cache"] == "HIT"
        left = [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers]
        assert left == [5, 4, 3, 2, 1, 1, 1, 0, 0]
        for answer in [fresh, *answers]:
            assert set(SIX) <= answer.headers.keys()
            assert answer.headers["x-ratelimit-limit-requests"] == "6"
            assert answer.headers["ratelimit-policy"] == (
                '"key-requests";q=6;w=60, "key-tokens";q=1000;w=60;qu="tokens", '
                '"key-concurrent";q=5;qu="concurrent-requests", "key-daily-tokens";q=9000;w=86400;qu="tokens"'
            )
            assert re.fullmatch(r'"key-requests";r=\d+;t=\d+, "key-tokens";r=\d+;t=\d+', answer.headers["ratelimit"])
        # One token of prompt, one of answer; a hit is a request, but no tokens.
        assert answers[0].headers["x-ratelimit-remaining-tokens"] == "998"
        assert answers[4].headers["x-ratelimit-remaining-tokens"] == answers[3].headers["x-ratelimit-remaining-tokens"]
        refused = answers[-1]
        assert error(refused) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        assert int(refused.headers["retry-after-ms"]) <= 61_000
        assert "x-should-retry" not in refused.headers
    with stack.client() as client:
        assert not {"ratelimit", "ratelimit-policy", *SIX} & client.get("/v1/models").headers.keys()


def test_a_key_with_budgets_alone_is_told_of_those(stack: Stack, admin: httpx.Client) -> None:
    with stack.client(make(admin, limits={"max_concurrent": 3})["key"]) as client:
        headers = client.post("/v1/completions", json=completion()).headers
    assert headers["ratelimit-policy"] == '"key-concurrent";q=3;qu="concurrent-requests"'
    assert "ratelimit" not in headers


def test_tokens_are_counted_as_they_are_asked_for(stack: Stack, admin: httpx.Client) -> None:
    with stack.client(make(admin, limits={"tokens_per_minute": 100})["key"]) as client:
        assert client.post("/v1/completions", json=completion(max_tokens=60)).status_code == 200
        refused = client.post("/v1/completions", json=completion(max_tokens=60))
        assert error(refused) == (429, "rate_limit_exceeded")
        assert refused.headers["x-ratelimit-remaining-tokens"] == "39"
        assert client.post("/v1/completions", json=completion(max_tokens=38)).status_code == 200
        never = client.post("/v1/completions", json=completion(max_tokens=100))
        assert error(never) == (429, "rate_limit_exceeded")
        assert never.headers["x-should-retry"] == "false"
        assert "retry-after" not in never.headers


def test_a_tenants_keys_share_its_limit_over_all_gateways(stack: Stack, admin: httpx.Client, second: str) -> None:
    keys = [make(admin, tenant="shared", limits={"requests_per_minute": 7})["key"] for _ in range(2)]
    admin.patch("/admin/v1/tenants/shared", json={"limits": {"requests_per_minute": 10}})
    served = dict.fromkeys(keys, 0)
    for number in range(30):
        key, url = keys[number % 2], (stack.url, second)[number // 2 % 2]
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/v1/completions", json=completion(), headers=headers, timeout=30)
        assert answer.status_code in (200, 429)
        served[key] += answer.status_code == 200
    assert served == dict.fromkeys(keys, 5)


def test_without_redis_each_gateway_keeps_to_its_share(
    stack: Stack, admin: httpx.Client, second: str, proxy: Proxy
) -> None:
    secret = make(admin, tenant="alone", limits={"requests_per_minute": 10})["key"]
    other = make(admin, tenant="alone", limits={"requests_per_minute": 10})["key"]
    with httpx.Client(base_url=second, headers={"Authorization": f"Bearer {secret}"}, timeout=30) as client:
        first = client.post("/v1/completions", json=CACHED)
        assert (first.status_code, first.headers["x-ratelimit-limit-requests"]) == (200, "10")
        proxy.set(Mode.REFUSE)
        answers = []
        try:
            stack.wait_until(
                lambda: client.get("/v1/models").headers.get("x-ratelimit-limit-requests") == "5", "its share"
            )
            answers = [client.post("/v1/completions", json=CACHED) for _ in range(10)]
        finally:
            proxy.set(Mode.PASS)
        # Two gateways live; one request was let through before.
        assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 6
        assert {answer.headers["x-ratelimit-policy"] for answer in answers} == {"degraded"}
        assert int(answers[-1].headers["retry-after"]) >= 1
        stack.wait_until(lambda: "x-ratelimit-policy" not in client.get("/v1/models").headers, "Redis to count again")
    with stack.client(other) as client:
        assert client.post("/v1/completions", json=completion()).headers["x-ratelimit-remaining-requests"] == "9"


def test_the_sdk_waits_as_told(stack: Stack, admin: httpx.Client) -> None:
    key = make(admin, limits={"requests_per_minute": 1})["key"]
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0) as client:
        client.completions.create(model="echo", prompt="x")
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="echo", prompt="x")
    assert caught.value.code == "rate_limit_exceeded"
    assert float(caught.value.response.headers["retry-after-ms"]) > 0
