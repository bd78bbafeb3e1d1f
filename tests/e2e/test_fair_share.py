"""More work than slots: whose calls run first."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import running
from tests.stack import Stack

pytestmark = pytest.mark.e2e

CONFIG = """
backends: {echo: {runtime: echo, concurrency: 2, max_queued: 100}}
models: {echo: {path: echo, backends: [echo]}}
"""


@pytest.fixture
def stack(server_urls: tuple[str, str], tmp_path: Path) -> Iterator[Stack]:
    """Each test has its own: a backlog that one leaves behind would decide what another may queue."""
    for stack in running(server_urls, tmp_path, CONFIG, []):
        stack.start_worker("echo", slots=2)
        yield stack


def submit(client: httpx.Client, first_token_ms: int = 500, **fields: Any) -> httpx.Response:
    options = {"first_token_ms": first_token_ms}
    body = {"model": "echo", "prompt": f"{uuid.uuid4()}", "max_tokens": 4, "options": options}
    return client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": body, **fields})


def test_a_late_tenant_overtakes_a_backlog_and_priorities_order_it(stack: Stack) -> None:
    with stack.client(stack.create_key("flood")) as flood, stack.client(stack.create_key("late")) as late:
        # Two that hold the slots while the rest is submitted, however slow the machine.
        for first_token_ms in [5000, 5000] + [200] * 24:
            assert submit(flood, first_token_ms).status_code == 202
        flexible = submit(flood, priority="flex").json()["id"]
        urgent = submit(flood, priority="priority").json()["id"]
        other = submit(late).json()["id"]
        for job_id, client in ((flexible, flood), (other, late)):
            assert client.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()["status"] == "succeeded"
        assert flood.get(f"/v1/jobs/{urgent}").json()["priority"] == "priority"
        assert flood.get(f"/v1/jobs/{flexible}/explain").json()["decision"]["level"] == "flex"
    rows = stack.query("SELECT id FROM jobs WHERE tenant IN ('flood', 'late') ORDER BY started_at")
    order = [str(row[0]) for row in rows]
    places = {name: order.index(job_id) for name, job_id in (("other", other), ("urgent", urgent), ("flex", flexible))}
    # 29 jobs, 2 at a time, and messages travel in bunches.
    assert places["other"] < 16, places
    assert places["urgent"] < 16, places
    assert places["flex"] >= 26, places


def test_one_tenant_cannot_fill_the_queue(stack: Stack) -> None:
    with stack.client(stack.create_key("filling")) as flood, stack.client(stack.create_key("small")) as small:
        refused = next(answer for answer in (submit(flood) for _ in range(200)) if answer.status_code != 202)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert float(refused.headers["retry-after"]) >= 1
        assert submit(small).status_code == 202
        jobs = flood.get("/v1/jobs", params={"status": "queued", "limit": 100}).json()["data"]
        for job in jobs:
            flood.post(f"/v1/jobs/{job['id']}/cancel")
        stack.wait_until(lambda: submit(flood).status_code == 202, "room again")
