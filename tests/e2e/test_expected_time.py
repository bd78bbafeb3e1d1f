"""Position, expected time and deadlines at the door, over HTTP."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import running
from tests.e2e.test_keys import error
from tests.stack import Stack

pytestmark = pytest.mark.e2e

CONFIG = """
backends: {echo: {runtime: echo, concurrency: 2}}
models: {echo: {path: echo, backends: [echo]}}
"""


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    for made in running(server_urls, tmp_path_factory.mktemp("eta"), CONFIG, []):
        made.start_worker("echo", slots=2)
        yield made


def submit(client: httpx.Client, number: int, **fields: Any) -> httpx.Response:
    body = {"model": "echo", "prompt": f"{number}", "max_tokens": 4, "options": {"first_token_ms": 300}}
    return client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": body, **fields})


@pytest.fixture(scope="module")
def measured(stack: Stack) -> Stack:
    """With a worker that has measured enough runs."""
    with stack.client() as client:
        # Before that, no deadline is called unmeetable.
        assert submit(client, -1, timeout_s=0.001).status_code == 202
        for number in range(20):
            last = submit(client, number)
        assert client.get(last.headers["location"], params={"wait": 30}).json()["status"] == "succeeded"
    query = "SELECT (stats #>> '{service,echo,num_runs}')::float8 FROM workers WHERE state = 'ready'"
    stack.wait_until(lambda: (stack.query(query)[0][0] or 0) >= 16, "measured runs")
    time.sleep(1.0)  # two surveys of the gateway
    return stack


def test_a_queued_job_knows_its_place_and_its_time(measured: Stack) -> None:
    with measured.client() as client:
        submitted = [submit(client, 100 + number) for number in range(16)]
        jobs = [client.get(one.headers["location"]).json() for one in submitted]
        waiting = [job for job in jobs if job["status"] == "queued"]
        places = [job["queue"]["position"] for job in waiting]
        assert places[-1] >= 8
        assert places == sorted(places)
        last = jobs[-1]["queue"]
        assert last["name"] == "echo"
        # Pairs of 0.3 s each.
        assert last["position"] / 2 * 300 * 0.6 < last["eta_ms"]["p50"] <= last["eta_ms"]["p90"] < 10_000
        assert submitted[-1].json()["queue"]["eta_ms"]["p50"] > 0

        late = submit(client, 200, timeout_s=0.2)
        assert error(late) == (429, "deadline_unmeetable")
        assert int(late.headers["retry-after"]) >= 1
        assert submit(client, 201, timeout_s=60).status_code == 202

        done = client.get(submitted[-1].headers["location"], params={"wait": 30}).json()
        assert (done["status"], done["queue"]) == ("succeeded", None)
        facts = client.get(f"{submitted[-1].headers['location']}/explain").json()["decision"]["chosen"]["facts"]
        assert facts["soonest_ms"] <= facts["eta_p50_ms"] <= facts["eta_p90_ms"]


def test_a_run_that_is_longer_than_the_deadline_need_not_be_sent_again(measured: Stack) -> None:
    stack = measured
    with stack.client() as client:
        idle = "SELECT 1 FROM jobs WHERE status IN ('queued', 'running')"
        stack.wait_until(lambda: not stack.query(idle), "an idle stack")
        time.sleep(1.0)  # two surveys of the gateway
        before = stack.query("SELECT count(*) FROM jobs")
        refused = submit(client, 300, timeout_s=0.02)
        assert error(refused) == (429, "deadline_unmeetable")
        assert refused.headers["x-should-retry"] == "false"
        absolute = submit(client, 301, deadline=time.time() + 0.02)
        assert error(absolute) == (429, "deadline_unmeetable")
        assert stack.query("SELECT count(*) FROM jobs") == before
