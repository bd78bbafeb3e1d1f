"""What holds for every route, walked rather than listed."""

import re
import subprocess
import sys

import httpx
import pytest
from fastapi.routing import APIRoute

from api.app import create_app
from tests.stack import Stack

OPEN = {"/healthz", "/readyz"}
ROUTES = [
    (method, route.path)
    for route in create_app().routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods)
]


def concrete(path: str) -> str:
    return re.sub(r"\{(job_id|key|model|file_id|batch_id)\}", "01a20979-8744-7650-870c-0098b145d576", path)


@pytest.mark.e2e
def test_every_route_but_the_health_checks_asks_for_a_key(stack: Stack) -> None:
    assert len(ROUTES) > 15
    with httpx.Client(base_url=stack.url) as client:
        for method, path in ROUTES:
            for headers in (
                {},
                {"Authorization": "Bearer sk-sy-" + "x" * 43},
                {"Authorization": f"Basic {stack.secret}"},
            ):
                response = client.request(method, concrete(path), headers=headers)
                if path in OPEN:
                    assert response.status_code == 200
                else:
                    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), path
                    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.e2e
def test_a_host_header_cannot_move_a_route(stack: Stack) -> None:
    with httpx.Client(base_url=stack.url) as client:
        response = client.get("/v1/models", headers={"Host": "x/healthz?"})
    assert response.status_code in (400, 401)


@pytest.mark.e2e
def test_bad_bodies_are_refused_over_the_wire_and_store_nothing(stack: Stack) -> None:
    before = stack.query("SELECT count(*) FROM jobs")
    chat = '{"model": "echo", "messages": [{"role": "user", "content": "MARKER"}]%s}'
    cases = [
        (b"", 400), (b"{", 400), (b"[]", 400), (b"\xff\xfe{}", 400), (b'{"a": NaN}', 400),
        ((chat % ', "temperature": 1e400').encode(), 400), ((chat % ', "temperature": Infinity').encode(), 400),
        ((chat % ', "model": "echo"').encode(), 400), ((chat % ', "api_base": "MARKER"').encode(), 400),
        ((chat % ', "n": "1"').encode(), 400), ((chat % ', "n": true').encode(), 400), ((chat % ', "n": 9').encode(), 400),
        ((chat % ', "max_tokens": 0').encode(), 400), ((chat % ', "max_tokens": 5000').encode(), 400),
        ((chat % ', "logit_bias": {"1": 5}').encode(), 400), ((chat % ', "stream_options": {}').encode(), 400),
        (chat.replace("MARKER", "\\u0000").replace("%s", "").encode(), 400), (b'{"model":"echo","messages":' + b"[" * 500, 400),
        (b'{"model": "MARKER", "messages": [{"role": "user", "content": "x"}]}', 404),
        (b'{"model": "echo", "messages": [{"role": "user", "content": "' + b"x" * 70_000 + b'"}]}', 413),
    ]  # fmt: skip
    with stack.client() as client:
        for body, status in cases:
            response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == status, body[:80]
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert "MARKER" not in response.text
        assert (
            client.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code
            == 415
        )
        assert client.put("/v1/chat/completions").status_code == 405
        assert client.get("/v1/jobs/not-a-uuid").status_code == 400
        assert client.get("/v1/jobs", params={"limit": 0}).status_code == 400
        assert client.get("/healthz").status_code == 200
    assert stack.query("SELECT count(*) FROM jobs") == before


def test_the_gateway_never_imports_a_model_runtime() -> None:
    code = "import sys, api.server, api.app; sys.exit(bool({'torch', 'transformers', 'vllm'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
