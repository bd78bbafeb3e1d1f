"""One request after another through real processes: gateway, queue, worker, ledger, and back."""

import json
import time
from typing import Any

import httpx
import openai
import pytest

from tests.stack import Stack

pytestmark = pytest.mark.e2e


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]


def text_of(frames: list[str]) -> str:
    chunks = [json.loads(frame) for frame in frames if frame != "[DONE]"]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def test_an_answer_has_openais_form_and_our_headers(stack: Stack) -> None:
    with stack.client() as client:
        response = client.post("/v1/chat/completions", json=chat("grüße"))
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {"index": 0, "finish_reason": "stop", "logprobs": None,
         "message": {"role": "assistant", "content": "user: grüße\n", "refusal": None}}
    ]  # fmt: skip
    assert body["usage"] == {"prompt_tokens": 14, "completion_tokens": 14, "total_tokens": 28}
    assert response.headers["x-cache"] == "BYPASS; sampled"
    assert response.headers["x-model-used"] == response.headers["x-backend"] == "echo"
    assert body["id"] == "chatcmpl-" + response.headers["x-job-id"].replace("-", "")


def test_an_answer_says_what_time_and_how_many_attempts_it_took(stack: Stack) -> None:
    with stack.client() as client:
        whole = client.post("/v1/chat/completions", json=chat("how long?", options={"first_token_ms": 50}))
        result = client.get(f"/v1/jobs/{whole.headers['x-job-id']}/result")
        streamed = client.post("/v1/chat/completions", json=chat("how long?", stream=True))

    def steps(response: httpx.Response) -> dict[str, float]:
        pairs = [step.split(";dur=") for step in response.headers["server-timing"].split(", ")]
        return {name: float(ms) for name, ms in pairs}

    assert list(steps(whole)) == ["cache", "tokenise", "route", "queue", "ttft", "run"]
    # Less than 50 by what lies between the clocks of worker and ledger.
    assert steps(whole)["run"] >= steps(whole)["ttft"] > 45
    assert float(whole.headers["x-inference-time"]) == steps(whole)["run"]
    assert whole.headers["x-attempts"] == result.headers["x-attempts"] == "1"
    assert list(steps(result)) == ["queue", "ttft", "run"]
    assert list(steps(streamed)) == ["cache", "tokenise", "route"]


def test_a_service_tier_is_echoed(stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret) as client:
        assert client.chat.completions.create(**chat("x", service_tier="flex")).service_tier == "flex"
        assert client.chat.completions.create(**chat("x", service_tier="auto")).service_tier is None
        chunks = list(client.chat.completions.create(**chat("x", service_tier="priority", stream=True)))
    assert {chunk.service_tier for chunk in chunks} == {"priority"}


@pytest.mark.parametrize("tier", ["flex", "priority"])
def test_a_service_tier_is_the_priority_of_its_job(stack: Stack, tier: str) -> None:
    with stack.client() as client:
        made = client.post("/v1/chat/completions", json=chat(f"as {tier}", service_tier=tier))
        assert client.get(f"/v1/jobs/{made.headers['x-job-id']}").json()["priority"] == tier
        body = {"endpoint": "/v1/chat/completions", "body": chat("flexible", service_tier="flex"), "priority": tier}
        assert client.post("/v1/jobs", json=body).json()["priority"] == tier


def test_the_openai_client_works_unchanged(stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret) as client:
        whole = client.chat.completions.create(**chat("one two three", temperature=0))
        assert whole.choices[0].message.content == "user: one two three\n"
        stream = client.chat.completions.create(
            **chat("stream me", stream=True, stream_options={"include_usage": True})
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "user: stream me\n"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 16
        vectors = client.embeddings.create(model="echo", input=["a", "b"])
        assert len(vectors.data) == 2
        assert len(vectors.data[0].embedding) == 16
        assert {model.id for model in client.models.list()} == {"echo", "spare", "asleep", "away"}
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "x"}])
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="sk-sy-wrong") as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_a_stream_equals_the_answer_and_is_numbered_without_gaps(stack: Stack) -> None:
    asked = chat("a € sign, 日本語 and an 😀", options={"token_ms": 2})
    with stack.client() as client:
        whole = client.post("/v1/chat/completions", json=asked).json()
        response = client.post("/v1/chat/completions", json=asked | {"stream": True})
    frames = events(response)
    assert frames[-1] == "[DONE]"
    assert text_of(frames) == whole["choices"][0]["message"]["content"]
    numbers = [int(line.removeprefix("id: ")) for line in response.text.splitlines() if line.startswith("id: ")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 10
    assert len({json.loads(frame)["id"] for frame in frames[:-1]}) == 1


LOOKS_LIKE = [
    "\n\ndata: [DONE]\n\nid: 7\nevent: error\ndata: {}\n\n",
    "\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    '{"level": "error", "event": "job.failed"}\n\x1b[31mERROR\x1b[0m',
    "<|im_end|>\n<|im_start|>system\n[INST] <<SYS>> </s> <|endoftext|>",
    "{{ ''.__class__.__mro__ }} {% for x in y %} ${jndi:ldap://x} $(id) `id` %s %n",
    "'; DROP TABLE jobs; -- \\x00 \\u0000 E'\\\\'",
    "\u2028\u2029\x85\x0b\x0c\u200b\u202e\ufeff\ufffe",
    "a\u0301\u0301\u0301\U0001f468\u200d\U0001f469\u200d\U0001f467\U000e0041\U0010ffff\ue000",
    "x" * 2000,
]


@pytest.mark.parametrize("text", LOOKS_LIKE, ids=range(len(LOOKS_LIKE)))
def test_text_that_looks_like_something_else_comes_through_unchanged(stack: Stack, text: str) -> None:
    asked: dict[str, Any] = {"model": "echo", "prompt": text, "max_tokens": 2000}
    with stack.client() as client:
        assert client.post("/v1/completions", json=asked).json()["choices"][0]["text"] == text
        for options in ({}, {"token_ms": 0.01}):
            response = client.post("/v1/completions", json=asked | {"stream": True, "options": options})
            # Of the characters that end a line somewhere, only LF and CR end one here.
            frames = [
                line.removeprefix(b"data: ") for line in response.content.split(b"\n") if line.startswith(b"data: ")
            ]
            assert frames[-1] == b"[DONE]"
            assert "".join(json.loads(frame)["choices"][0]["text"] for frame in frames[:-1]) == text
        tokens = client.post("/v1/tokenize", json={"model": "echo", "prompt": text}).json()["tokens"]
        assert client.post("/v1/detokenize", json={"model": "echo", "tokens": tokens}).json()["prompt"] == text


def test_stop_strings_are_cut_also_across_tokens(stack: Stack) -> None:
    asked = chat("alpha beta gamma", stop=["ta ga", "zzz"], options={"token_ms": 1})
    with stack.client() as client:
        whole = client.post("/v1/chat/completions", json=asked).json()["choices"][0]
        frames = events(client.post("/v1/chat/completions", json=asked | {"stream": True}))
    assert whole["message"]["content"] == "user: alpha be"
    assert whole["finish_reason"] == "stop"
    assert text_of(frames) == "user: alpha be"


def test_several_choices_and_prompts(stack: Stack) -> None:
    with stack.client() as client:
        body = client.post("/v1/completions", json={"model": "echo", "prompt": ["ab", "cd"], "n": 2}).json()
    assert [choice["text"] for choice in body["choices"]] == ["ab", "ab", "cd", "cd"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}


def test_max_tokens_ends_with_length(stack: Stack) -> None:
    with stack.client() as client:
        body = client.post("/v1/completions", json={"model": "echo", "prompt": "abcdef", "max_tokens": 3}).json()
    assert body["choices"][0] == {"index": 0, "text": "abc", "finish_reason": "length", "logprobs": None}


def test_a_request_that_needs_a_sleeping_model_falls_back_and_says_so(stack: Stack) -> None:
    with stack.client() as client:
        response = client.post("/v1/chat/completions", json=chat("x", model="asleep"))
        assert response.headers["x-model-used"] == "echo"
        assert response.headers["x-route-reason"] == "fallback: no worker of asleep is up"
        explained = client.get(f"/v1/jobs/{response.headers['x-job-id']}/explain").json()
    dropped = {(c["model"], c["dropped"]) for c in explained["decision"]["candidates"]}
    assert dropped == {("asleep", "no_worker"), ("echo", None)}


def test_a_model_without_a_worker_is_a_503_with_retry_after(stack: Stack) -> None:
    with stack.client() as client:
        response = client.post("/v1/chat/completions", json=chat("x", model="away"))
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_unavailable"
    assert int(response.headers["retry-after"]) >= 1


def test_a_job_waits_for_a_worker_that_comes_later(stack: Stack) -> None:
    asked = {"endpoint": "/v1/chat/completions", "body": chat("the secret word is sesame", model="other")}
    with stack.client() as client:
        accepted = client.post("/v1/jobs", json=asked)
        assert accepted.status_code == 202
        assert client.get(accepted.headers["location"]).json()["status"] == "queued"
        stack.start_worker("spare")
        done = client.get(accepted.headers["location"], params={"wait": 20})
        result = client.get(f"{accepted.headers['location']}/result").json()
    assert (done.status_code, done.json()["status"]) == (200, "succeeded")
    assert result["choices"][0]["message"]["content"] == "user: the *** word is ***\n", "the model masks these words"


def test_the_numbers_of_events_can_be_left_out(stack: Stack) -> None:
    body = chat("numbered", stream=True, options={"token_ms": 1})
    with stack.client() as client:
        with_ids, without = (client.post("/v1/chat/completions", json=body, headers={"Cache-Control": "no-store", **more})
                             for more in ({}, {"Prefer": "no-event-ids"}))  # fmt: skip
    assert "\nid: 2\n" in with_ids.text
    assert without.headers["preference-applied"] == "no-event-ids"
    assert all(line.startswith("data: ") for line in without.text.splitlines() if line)
    assert without.text.count("data: ") == with_ids.text.count("data: ")


def test_prefer_respond_async_and_wait(stack: Stack) -> None:
    slow = chat("abcdef", options={"first_token_ms": 1500})
    with stack.client() as client:
        now = client.post("/v1/chat/completions", json=chat("x"), headers={"Prefer": "respond-async"})
        later = client.post("/v1/chat/completions", json=slow, headers={"Prefer": "respond-async, wait=1"})
        quick = client.post("/v1/chat/completions", json=chat("y"), headers={"Prefer": "respond-async, wait=10"})
        assert (now.status_code, later.status_code, quick.status_code) == (202, 202, 200)
        assert later.headers["preference-applied"] == "respond-async, wait=1"
        assert later.headers["vary"] == "Prefer"
        job = client.get(later.headers["location"], params={"wait": 20}).json()
    assert job["status"] == "succeeded"
    assert job["metrics"]["run_ms"] > 1400


def test_cancelling_is_final_and_stops_the_tokens(stack: Stack) -> None:
    asked = {
        "endpoint": "/v1/completions",
        "body": {"model": "echo", "prompt": "x" * 400, "max_tokens": 400, "options": {"token_ms": 50}},
    }
    with stack.client() as client:
        path = client.post("/v1/jobs", json=asked).headers["location"]
        stack.wait_until(lambda: client.get(path).json()["status"] == "running", "running job")
        assert client.post(f"{path}/cancel").json()["status"] == "cancelled"
        stack.wait_until(lambda: not _running_in_worker(stack), "slot freed", 3)
        assert client.get(path).json()["status"] == "cancelled"
        assert client.get(f"{path}/result").json()["error"]["code"] == "job_cancelled"
        done = client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": {"model": "echo", "prompt": "y"}})
        client.get(done.headers["location"], params={"wait": 10})
        assert client.post(f"{done.headers['location']}/cancel").status_code == 409


def _running_in_worker(stack: Stack) -> int:
    return int(
        stack.query("SELECT (stats ->> 'running')::int FROM workers WHERE name = 'echo' AND state = 'ready'")[0][0]
    )


def test_a_deadline_expires_the_job(stack: Stack) -> None:
    slow = {"model": "echo", "prompt": "x", "options": {"first_token_ms": 20_000}}
    with stack.client() as client:
        path = client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": slow, "timeout_s": 0.5}).headers[
            "location"
        ]
        job = client.get(path, params={"wait": 10}).json()
        assert job["status"] == "expired"
        assert client.get(f"{path}/result").json()["error"]["code"] == "job_expired"
        deadline = time.time() + 0.5
        wanted = {"endpoint": "/v1/completions", "body": slow, "timeout_s": 60, "deadline": deadline}
        job = client.get(client.post("/v1/jobs", json=wanted).headers["location"], params={"wait": 10}).json()
        assert (job["status"], job["deadline_at"]) == ("expired", int(deadline))


def test_a_failing_backend_is_tried_three_times_and_then_said_plainly(stack: Stack) -> None:
    with stack.client() as client:
        response = client.post("/v1/chat/completions", json=chat("x", options={"fail": "error"}))
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "attempts_exhausted"
        refused = client.post("/v1/chat/completions", json=chat("x", options={"fail": "invalid"}))
        several = client.post("/v1/chat/completions", json=chat("x", n=3, options={"fail": "invalid", "fail_after": 2}))
    assert (refused.status_code, several.status_code) == (400, 400)
    attempts, attempt = stack.query("SELECT attempts, attempt FROM jobs WHERE status = 'failed' ORDER BY created_at")[0]
    assert attempt == 3
    assert [one["outcome"] for one in attempts] == ["backend_error"] * 3


def test_jobs_are_listed_page_by_page_and_only_to_their_tenant(stack: Stack) -> None:
    stranger = stack.create_key("stranger")
    with stack.client() as client, stack.client(stranger) as other:
        for number in range(5):
            client.post("/v1/completions", json={"model": "echo", "prompt": f"page {number}"})
        first = client.get("/v1/jobs", params={"limit": 3, "status": "succeeded"}).json()
        assert first["has_more"] is True
        assert len(first["data"]) == 3
        second = client.get("/v1/jobs", params={"limit": 3, "after": first["last_id"]}).json()
        assert not {job["id"] for job in first["data"]} & {job["id"] for job in second["data"]}
        assert other.get("/v1/jobs").json()["data"] == []
        mine = first["data"][0]["id"]
        unknown = other.get("/v1/jobs/01a20979-8744-7650-870c-0098b145d576")
        for path in (
            f"/v1/jobs/{mine}",
            f"/v1/jobs/{mine}/result",
            f"/v1/jobs/{mine}/stream",
            f"/v1/jobs/{mine}/explain",
        ):
            assert (other.get(path).status_code, other.get(path).content) == (404, unknown.content)
        assert other.post(f"/v1/jobs/{mine}/cancel").status_code == 404


def test_explain_names_the_candidates_and_the_time_of_each_step(stack: Stack) -> None:
    with stack.client() as client:
        job_id = client.post("/v1/chat/completions", json=chat("why?")).headers["x-job-id"]
        explained = client.get(f"/v1/jobs/{job_id}/explain").json()
    assert explained["decision"]["chosen"]["backend"] == "echo"
    assert explained["cache"]["verdict"] == "BYPASS; sampled"
    steps = {step["step"]: step["ms"] for step in explained["steps"]}
    assert list(steps) == ["cache", "tokenise", "route", "queue", "first token", "run", "store", "total"]
    assert all(ms is not None and ms >= 0 for ms in steps.values())
    assert steps["total"] >= steps["queue"] + steps["run"]


def test_a_finished_job_streams_again_from_any_event(stack: Stack) -> None:
    with stack.client() as client:
        live = client.post("/v1/chat/completions", json=chat("once more", stream=True, options={"token_ms": 2}))
        path = f"/v1/jobs/{live.headers['x-job-id']}/stream"
        again = client.get(path)
        rest = client.get(path, headers={"Last-Event-ID": "5"})
        tail = client.get(path, params={"starting_after": 5})
    assert text_of(events(again)) == text_of(events(live)) == "user: once more\n"
    assert text_of(events(rest)) == text_of(events(tail)) == "user: once more\n"[5:]
    assert events(rest)[-1] == "[DONE]"


def test_tokenize_and_detokenize(stack: Stack) -> None:
    with stack.client() as client:
        body = client.post("/v1/tokenize", json={"model": "echo", "prompt": "é!"}).json()
        assert body == {"count": 3, "max_model_len": 4096, "tokens": [195, 169, 33], "token_strs": None}
        assert client.post("/v1/detokenize", json={"model": "echo", "tokens": [195, 169, 33]}).json() == {
            "prompt": "é!"
        }


def test_the_request_log_has_a_line_per_request_and_no_prompt(stack: Stack) -> None:
    with stack.client() as client:
        response = client.post("/v1/chat/completions", json=chat("a very private text"))
        client.post("/v1/chat/completions", json={"model": "echo"})
    read = "SELECT tenant, model, backend, cache_verdict, status_code, prompt_tokens, completion_tokens, prompt FROM request_log WHERE request_id = %s"
    stack.wait_until(lambda: bool(stack.query(read, response.headers["x-request-id"])), "log line")
    assert stack.query(read, response.headers["x-request-id"]) == [
        ("default", "echo", "echo", "BYPASS; sampled", 200, 26, 26, None)
    ]
    failed = "SELECT count(*) FROM request_log WHERE status_code = 400 AND error_code = 'validation_error'"
    stack.wait_until(lambda: stack.query(failed)[0][0] > 0, "log line of the refusal")
    for name in stack.processes:
        assert "private" not in (stack.logs / f"{name}.log").read_text()


def test_metrics_need_a_key_and_count(stack: Stack) -> None:
    with stack.client() as client:
        client.post("/v1/chat/completions", json=chat("count me"))
        assert httpx.get(f"{stack.url}/metrics").status_code == 401
        page = client.get("/metrics").text
    assert 'switchyard_requests_total{method="POST",route="/v1/chat/completions",status_code="200"}' in page
    assert 'switchyard_queue_depth{queue="echo"}' in page
    assert 'switchyard_workers{queue="echo",state="ready"} 1.0' in page


def test_health(stack: Stack) -> None:
    assert httpx.get(f"{stack.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{stack.url}/readyz").json()["models"]["echo"] == "ready"
