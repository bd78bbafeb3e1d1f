"""The response cache, seen from outside."""

import json
from typing import Any

import httpx
import pytest

from tests.stack import Stack

pytestmark = pytest.mark.e2e


def ask(client: httpx.Client, text: str, cache_control: str = "", **fields: Any) -> httpx.Response:
    body = {"model": "echo", "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
    headers = {"Cache-Control": cache_control} if cache_control else {}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def test_a_repeated_request_is_answered_with_the_same_bytes_and_no_job(stack: Stack) -> None:
    with stack.client() as client:
        first, second = ask(client, "same bytes"), ask(client, "same bytes")
    assert (first.headers["x-cache"], second.headers["x-cache"]) == ("MISS; not stored", "HIT")
    assert first.content == second.content
    assert int(second.headers["age"]) >= 0
    assert second.headers["x-job-id"] == first.headers["x-job-id"]
    key = stack.query(
        "SELECT num_hits, encode(sha256, 'hex') = encode(sha256(body), 'hex') FROM response_cache WHERE encode(key, 'hex') = %s",
        second.headers["x-cache-key"],
    )
    assert key[0][1] is True


def test_a_hit_is_streamed_to_who_asks_for_a_stream(stack: Stack) -> None:
    with stack.client() as client:
        whole = ask(client, "stream a hit").json()
        streamed = ask(client, "stream a hit", stream=True, stream_options={"include_usage": True})
    assert streamed.headers["x-cache"] == "HIT"
    frames = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert frames[-1] == "[DONE]"
    first, last = json.loads(frames[0]), json.loads(frames[-2])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": whole["choices"][0]["message"]["content"]}
    assert (last["choices"], last["usage"]) == ([], whole["usage"])


def test_a_streamed_answer_is_stored_for_who_asks_without(stack: Stack) -> None:
    with stack.client() as client:
        ask(client, "stored by a stream", stream=True)
        assert ask(client, "stored by a stream").headers["x-cache"] == "HIT"


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 7}, {"stop": "x"}, {"seed": 1}, {"top_p": 0.5}, {"n": 2}, {"top_k": 3}, {"options": {"num_tokens": 5}}],
)  # fmt: skip
def test_whatever_changes_the_answer_changes_the_key(stack: Stack, change: dict[str, Any]) -> None:
    with stack.client() as client:
        ask(client, "one field more")
        assert ask(client, "one field more", **change).headers["x-cache"] != "HIT"


def test_equal_meaning_is_one_key(stack: Stack) -> None:
    with stack.client() as client:
        ask(client, "equal meaning", max_tokens=50, stop=["zz"])
        again = ask(client, "equal meaning", max_completion_tokens=50, stop="zz", temperature=0.0, user="somebody")
    assert again.headers["x-cache"] == "HIT"


def test_another_tenant_has_another_cache(stack: Stack) -> None:
    with stack.client() as client, stack.client(stack.create_key("neighbour")) as other:
        ask(client, "not for neighbours")
        assert ask(other, "not for neighbours").headers["x-cache"] == "MISS; not stored"


def test_cache_control_is_honoured(stack: Stack) -> None:
    with stack.client() as client:
        assert ask(client, "directives", "no-store").headers["x-cache"] == "BYPASS; no-store"
        missing = ask(client, "directives", "only-if-cached")
        assert (missing.status_code, missing.json()["error"]["code"]) == (504, "only_if_cached")
        first = ask(client, "directives")
        assert first.headers["x-cache"] == "MISS; not stored", "no-store stored nothing"
        refreshed = ask(client, "directives", "no-cache")
        assert refreshed.headers["x-cache"] == "BYPASS; no-cache"
        assert refreshed.headers["x-job-id"] != first.headers["x-job-id"]
        assert ask(client, "directives").headers["x-job-id"] == refreshed.headers["x-job-id"], "the newer answer counts"
        stack.query("UPDATE response_cache SET created_at = created_at - interval '100 s' RETURNING 1")
        assert ask(client, "directives", "max-age=50").headers["x-cache"] == "MISS; older than max-age"
        assert ask(client, "directives", "max-age=5000").headers["x-cache"] == "HIT"
        assert ask(client, "directives", "max-age=soon").status_code == 400


def test_sampled_answers_are_stored_only_when_asked(stack: Stack) -> None:
    with stack.client() as client:
        assert ask(client, "sampled", temperature=1).headers["x-cache"] == "BYPASS; sampled"
        assert ask(client, "sampled", temperature=1).headers["x-cache"] == "BYPASS; sampled"
        assert ask(client, "sampled", "max-age=60", temperature=1).headers["x-cache"] == "MISS; not stored"
        assert ask(client, "sampled", "max-age=60", temperature=1).headers["x-cache"] == "HIT"
        assert ask(client, "seeded", temperature=1, seed=7).headers["x-cache"] == "MISS; not stored"
        assert ask(client, "seeded", temperature=1, seed=7).headers["x-cache"] == "HIT"


def test_failed_answers_are_never_stored(stack: Stack) -> None:
    with stack.client() as client:
        for _ in range(2):
            assert ask(client, "never", options={"fail": "invalid"}).status_code == 400


def test_an_entry_expires(stack: Stack) -> None:
    with stack.client() as client:
        ask(client, "short life")
        key = ask(client, "short life").headers["x-cache-key"]
        stack.query(
            "UPDATE response_cache SET expires_at = clock_timestamp() WHERE encode(key, 'hex') = %s RETURNING 1", key
        )
        # A hit confirmed within the last second may still be answered from memory.
        stack.wait_until(lambda: ask(client, "short life").headers["x-cache"] == "MISS; not stored", "expiry", 3)


def test_a_hot_entry_ages_and_counts_its_hits(stack: Stack) -> None:
    with stack.client() as client:
        ask(client, "hot")
        stack.query("UPDATE response_cache SET created_at = created_at - interval '50 s' RETURNING 1")
        hits = [ask(client, "hot") for _ in range(20)]
        assert {hit.headers["x-cache"] for hit in hits} == {"HIT"}
        assert all(50 <= int(hit.headers["age"]) <= 60 for hit in hits)
        key = hits[0].headers["x-cache-key"]
        counted = "SELECT num_hits FROM response_cache WHERE encode(key, 'hex') = %s"
        stack.wait_until(lambda: stack.query(counted, key) == [(20,)], "20 hits counted", 10)


def test_purge_by_key_by_model_and_all(stack: Stack) -> None:
    with stack.client(stack.create_key("purger")) as client:
        for text in ("a", "b", "c"):
            ask(client, text)
        key = ask(client, "a").headers["x-cache-key"]
        assert client.delete(f"/v1/cache/{key}").json()["removed"] == 1
        assert ask(client, "a").headers["x-cache"] == "MISS; not stored"
        assert client.get("/v1/cache").json()["data"][0]["entries"] == 3
        assert client.delete("/v1/cache", params={"model": "spare"}).json()["removed"] == 0
        assert client.delete("/v1/cache", params={"model": "echo"}).json()["removed"] == 3
        assert client.delete("/v1/cache/not-a-key").status_code == 400
    with stack.client() as client:
        assert ask(client, "same bytes for the default tenant").status_code == 200
        assert client.delete("/v1/cache").json()["removed"] >= 1
