"""Webhooks from the end of a job to a receiver, whatever dies on the way."""

import contextlib
import http.server
import json
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import running
from tests.stack import Stack

pytestmark = pytest.mark.e2e

CONFIG = """
backends: {echo: {runtime: echo, concurrency: 64}}
models: {echo: {path: echo, backends: [echo]}}
"""


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps what it is sent; answers with the statuses it is given, then with 200."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.events: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.url = f"http://localhost:{self.server_port}/hook"

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.events]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.events.append(({name.lower(): value for name, value in self.headers.items()}, body))
        status, headers = self.server.answers.pop(0) if self.server.answers else (200, {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    for made in running(server_urls, tmp_path_factory.mktemp("webhooks"), CONFIG, ["echo"]):
        made.environment |= {
            "SWITCHYARD_WEBHOOK_NETWORKS": "127.0.0.0/8",
            "SWITCHYARD_WEBHOOK_RETRY_S": "0.1,0.1,0.1",
            "SWITCHYARD_WEBHOOK_TIMEOUT_S": "5",
        }
        made.stop("reconciler")
        made.start_reconciler()
        yield made


@pytest.fixture
def secret(stack: Stack) -> str:
    with stack.client() as client:
        made = client.post("/v1/webhooks/secrets")
    assert made.status_code == 201
    return str(made.json()["secret"])


def submit(client: httpx.Client, url: str, text: str = "x", **fields: Any) -> str:
    body = {"model": "echo", "prompt": text, "options": fields.pop("options", {})}
    job = {"endpoint": "/v1/completions", "body": body, "webhook": {"url": url, **fields}}
    response = client.post("/v1/jobs", json=job)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def deliveries(client: httpx.Client, object_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/v1/webhooks/deliveries", params={"object_id": object_id}).json()["data"]
    return found


def ended(stack: Stack, client: httpx.Client, object_id: str) -> dict[str, Any]:
    stack.wait_until(lambda: any(one["status"] != "pending" for one in deliveries(client, object_id)), "delivery's end")
    return deliveries(client, object_id)[0]


def test_openais_client_unwraps_what_ends_a_response(stack: Stack, receiver: Receiver, secret: str) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret, webhook_secret=secret) as client:
        for fields, kind in (({}, "response.completed"), ({"max_output_tokens": 2}, "response.incomplete"),
                             ({"options": {"fail": "invalid"}}, "response.failed")):  # fmt: skip
            made = client.responses.create(
                model="echo", input="x", background=True, extra_body={"webhook": {"url": receiver.url}, **fields}
            )
            stack.wait_until(lambda: bool(receiver.events), kind)
            headers, body = receiver.events.pop()
            event: Any = client.webhooks.unwrap(body, headers)
            assert (event.type, event.data.id, event.object) == (kind, made.id, "event")
            assert event.id == headers["webhook-id"]
            with pytest.raises(openai.InvalidWebhookSignatureError):
                client.webhooks.unwrap(body.replace(b"event", b"evil!"), headers)


def test_a_rotated_secret_signs_beside_the_new_one(stack: Stack, receiver: Receiver, secret: str) -> None:
    with stack.client() as client, openai.OpenAI(api_key="x") as verifier:
        newer = client.post("/v1/webhooks/secrets").json()["secret"]
        job_id = submit(client, receiver.url)
        assert ended(stack, client, job_id)["status"] == "delivered"
        headers, body = receiver.events[0]
        for one in (secret, newer):
            verifier.webhooks.verify_signature(body, headers, secret=one)
        listed = client.get("/v1/webhooks/secrets")
        assert len(listed.json()["data"]) == 2
        assert newer not in listed.text
        assert secret not in listed.text


def test_it_is_tried_again_under_the_same_id_until_it_is_taken(stack: Stack, receiver: Receiver, secret: str) -> None:
    receiver.answers = [(500, {}), (302, {"Location": "http://localhost:1/"}), (429, {"Retry-After": "2"})]
    with stack.client() as client:
        job_id = submit(client, receiver.url)
        stack.wait_until(lambda: len(receiver.events) == 3, "three tries")
        third = time.monotonic()
        delivery = ended(stack, client, job_id)
        assert time.monotonic() - third > 1.5
        assert (delivery["status"], delivery["attempts"], delivery["last_status_code"]) == ("delivered", 4, 200)
        assert len(set(receiver.ids)) == 1
        receiver.answers = [(500, {})] * 9
        job_id = submit(client, receiver.url)
        assert ended(stack, client, job_id)["status"] == "failed"
        assert len(receiver.events) == 8
        receiver.answers = []
        again = client.post(f"/v1/webhooks/deliveries/{deliveries(client, job_id)[0]['id']}/redeliver")
        assert (again.status_code, again.json()["status"]) == (202, "pending")
        assert ended(stack, client, job_id)["status"] == "delivered"
        assert len(set(receiver.ids)) == 2


def test_gone_disables_the_url(stack: Stack, receiver: Receiver, secret: str) -> None:
    receiver.answers = [(410, {})]
    with stack.client() as client:
        assert ended(stack, client, submit(client, receiver.url))["status"] == "disabled"
        assert ended(stack, client, submit(client, receiver.url))["status"] == "disabled"
        assert len(receiver.events) == 1


def test_only_wanted_events_are_sent(stack: Stack, receiver: Receiver, secret: str) -> None:
    with stack.client() as client:
        quiet = submit(client, receiver.url, events=["job.failed"])
        loud = submit(client, receiver.url, events=["job.cancelled"], options={"first_token_ms": 20_000})
        client.post(f"/v1/jobs/{loud}/cancel")
        assert ended(stack, client, loud)["type"] == "job.cancelled"
        assert client.get(f"/v1/jobs/{quiet}", params={"wait": 10}).json()["status"] == "succeeded"
        assert deliveries(client, quiet) == []
        assert len(receiver.events) == 1


def test_what_could_not_be_delivered_is_refused(stack: Stack, secret: str) -> None:
    with stack.client() as client, stack.client(stack.create_key("stranger")) as stranger:
        job = {"endpoint": "/v1/completions", "body": {"model": "echo", "prompt": "x"}}
        for url in ("http://169.254.169.254/", "ftp://x/", "http://[::1]/", "http://u:p@example.com/"):
            refused = client.post("/v1/jobs", json=job | {"webhook": {"url": url}})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "webhook.url")
            assert url not in refused.text
        refused = stranger.post("/v1/jobs", json=job | {"webhook": {"url": "https://example.com/"}})
        assert refused.json()["error"]["code"] == "webhook_secret_missing"
        known = client.get("/v1/webhooks/deliveries").json()["data"]
        for delivery_id in [one["id"] for one in known[:1]] + ["01a20979-8744-7650-870c-0098b145d576"]:
            response = stranger.post(f"/v1/webhooks/deliveries/{delivery_id}/redeliver")
            assert (response.status_code, response.json()["error"]["code"]) == (404, "delivery_not_found")
        assert stranger.get("/v1/webhooks/deliveries").json()["data"] == []


def test_a_name_that_leads_inside_is_never_called(stack: Stack, receiver: Receiver, secret: str) -> None:
    stack.stop("reconciler")
    stack.start_reconciler(SWITCHYARD_WEBHOOK_NETWORKS="")
    try:
        with stack.client() as client:
            delivery = ended(stack, client, submit(client, receiver.url))
    finally:
        stack.stop("reconciler")
        stack.start_reconciler()
    assert (delivery["status"], delivery["last_error"]) == ("failed", "the URL must not lead into a private network")
    assert receiver.events == []


def test_what_dies_between_the_end_and_the_delivery_loses_nothing(
    stack: Stack, receiver: Receiver, secret: str
) -> None:
    stack.kill("reconciler")
    with stack.client() as client:
        ids = [submit(client, receiver.url, text=f"job {number}") for number in range(20)]
        for job_id in ids:
            assert client.get(f"/v1/jobs/{job_id}", params={"wait": 20}).json()["status"] == "succeeded"
        assert receiver.events == []
        stack.start_reconciler()
        for job_id in ids:
            assert ended(stack, client, job_id)["status"] == "delivered"
    assert len(receiver.ids) == len(set(receiver.ids)) == 20


def test_a_delivery_that_its_claimer_took_along_is_made_by_the_next(
    stack: Stack, receiver: Receiver, secret: str
) -> None:
    with stack.client() as client, contextlib.ExitStack() as undo:
        # The receiver is stopped in the middle: it has the request, and its answer never comes.
        held = threading.Event()
        undo.callback(held.set)
        receiver.answers = _Holding(held)
        job_id = submit(client, receiver.url)
        stack.wait_until(lambda: len(receiver.events) == 1, "first try")
        stack.kill("reconciler", signal.SIGKILL)
        held.set()
        receiver.answers = []
        # The claim of the dead runs out.
        stack.query("UPDATE webhook_deliveries SET next_at = clock_timestamp() WHERE object_id = %s", job_id)
        stack.start_reconciler()
        assert ended(stack, client, job_id)["status"] == "delivered"
    assert len(receiver.ids) == 2
    assert len(set(receiver.ids)) == 1


class _Holding(list[tuple[int, dict[str, str]]]):
    """One answer, held back."""

    def __init__(self, released: threading.Event) -> None:
        super().__init__([(500, {})])
        self._released = released

    def pop(self, index: Any = -1) -> tuple[int, dict[str, str]]:
        self._released.wait(30)
        return super().pop(index)


def test_jobs_are_filtered_kept_and_deleted_as_asked(stack: Stack) -> None:
    with stack.client() as client, stack.client(stack.create_key("nosy")) as nosy:
        job: dict[str, Any] = {"endpoint": "/v1/completions", "body": {"model": "echo", "prompt": "x"}}
        ids = [
            client.post("/v1/jobs", json=job | {"metadata": {"run": run}, "result_ttl_s": 600},
                        headers={"Cache-Control": "no-store"}).json()["id"]
            for run in ("a", "b")
        ]  # fmt: skip
        found = client.get("/v1/jobs", params={"metadata[run]": "b"}).json()["data"]
        assert [one["id"] for one in found] == [ids[1]]
        assert found[0]["result_ttl_s"] == 600
        ended = client.get(f"/v1/jobs/{ids[1]}", params={"wait": 20}).json()
        assert ended["expires_at"] == ended["completed_at"] + 600
        assert client.get("/v1/jobs", params={"metadata[run]": "b", "metadata[x]": "y"}).json()["data"] == []
        assert client.get("/v1/jobs", params={"metadata[run]": "x" * 513}).status_code == 400
        live = client.post(
            "/v1/jobs", json=job | {"body": job["body"] | {"options": {"first_token_ms": 20_000}}}
        ).json()["id"]
        refused = client.delete(f"/v1/jobs/{live}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict_state")
        client.post(f"/v1/jobs/{live}/cancel")
        for job_id in (live, *ids):
            client.get(f"/v1/jobs/{job_id}", params={"wait": 10})
            assert nosy.delete(f"/v1/jobs/{job_id}").status_code == 404
            assert client.delete(f"/v1/jobs/{job_id}").json() == {"id": job_id, "object": "job", "deleted": True}
            assert client.get(f"/v1/jobs/{job_id}").status_code == 404
            assert client.delete(f"/v1/jobs/{job_id}").status_code == 404


def test_ended_jobs_are_deleted_together(stack: Stack) -> None:
    with stack.client(stack.create_key("tidy")) as client, stack.client(stack.create_key("untidy")) as other:

        def ended(caller: httpx.Client, endpoint: str) -> str:
            body = {"endpoint": endpoint, "body": {"model": "echo", "prompt": uuid.uuid4().hex, "temperature": 0}}
            job_id = str(caller.post("/v1/jobs", json=body).json()["id"])
            assert caller.get(f"/v1/jobs/{job_id}", params={"wait": 10}).json()["status"] == "succeeded"
            return job_id

        mine, theirs = [ended(client, "/v1/completions") for _ in range(5)], ended(other, "/v1/completions")
        slow = {"model": "echo", "prompt": "x", "options": {"first_token_ms": 20_000}}
        live = client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": slow}).json()["id"]
        for query in (
            {"status": "failed"},
            {"model": "other"},
            {"endpoint": "/v1/embeddings"},
            {"before": 1_000_000_000},
        ):
            assert client.delete("/v1/jobs", params=query).json() == {
                "object": "job.deletion", "deleted": 0, "has_more": False,
            }  # fmt: skip
        matching: dict[str, str | int] = {
            "status": "succeeded",
            "model": "echo",
            "before": int(time.time()) + 60,
            "limit": 2,
        }
        first = client.delete("/v1/jobs", params=matching).json()
        assert first == {"object": "job.deletion", "deleted": 2, "has_more": True}
        left = [one["id"] for one in client.get("/v1/jobs").json()["data"]]
        assert left == [live, *mine[:1:-1]], "the oldest went first"
        assert client.delete("/v1/jobs").json()["deleted"] == 3
        assert [one["id"] for one in client.get("/v1/jobs").json()["data"]] == [live]
        assert other.get(f"/v1/jobs/{theirs}").status_code == 200
        assert stack.query("SELECT count(*) FROM response_cache WHERE tenant = 'tidy'") == [(0,)]
        client.post(f"/v1/jobs/{live}/cancel")


def test_a_batch_tells_of_its_end_in_openais_words(stack: Stack, receiver: Receiver, secret: str) -> None:
    good = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions",
                       "body": {"model": "echo", "prompt": "x", "options": {"first_token_ms": 60_000}}})  # fmt: skip
    quick = good.replace("60000", "1")
    stack.start_batcher()
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret, webhook_secret=secret) as client:
        for text, kind in ((quick, "completed"), ("{}", "failed"), (good, "cancelled"), (good, "expired")):
            file = client.files.create(file=("x", text.encode()), purpose="batch")
            made = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h",
                                         extra_body={"webhook": {"url": receiver.url}})  # fmt: skip
            if text is good:
                stack.wait_until(
                    lambda: client.batches.retrieve(made.id).status == "in_progress", "a running batch", 60
                )
            if kind == "cancelled":
                client.batches.cancel(made.id)
            elif kind == "expired":
                stack.query("UPDATE batches SET expires_at = clock_timestamp() WHERE status = 'in_progress'")
            stack.wait_until(lambda: bool(receiver.events), "an event", 60)
            headers, body = receiver.events.pop()
            event: Any = client.webhooks.unwrap(body, headers)
            assert (event.type, event.data.id) == (f"batch.{kind}", made.id)
            assert client.batches.retrieve(made.id).status == kind
            assert receiver.events == []
    stack.stop("batcher")
