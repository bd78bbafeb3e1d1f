"""The operator's commands against a running stack."""

import json
import subprocess
import sys

import pytest

from tests.stack import ROOT, Stack

pytestmark = pytest.mark.e2e


def switchyard(stack: Stack, *arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "api.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=stack.environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_a_command_does_not_wait_for_the_gateways_code() -> None:
    code = "import sys, api.cli; print({'api.gateway', 'fastapi', 'transformers', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_key_opens_the_door_until_it_is_revoked(stack: Stack) -> None:
    made = json.loads(switchyard(stack, "keys", "create", "--name", "cli", "--tenant", "cli", "--json"))
    listed = json.loads(switchyard(stack, "keys", "list", "--json"))
    assert made["key"] not in json.dumps(listed)
    assert [key["state"] for key in listed if key["id"] == made["id"]] == ["active"]
    with stack.client(made["key"]) as client:
        assert client.get("/v1/models").status_code == 200
        assert "revoked" in switchyard(stack, "keys", "revoke", made["id"])
        stack.wait_until(lambda: client.get("/v1/models").status_code == 401, "refusal of the revoked key", 3)
    assert "see `switchyard keys list`" in switchyard(stack, "keys", "revoke", made["id"], status=1)


def test_jobs_can_be_listed_shown_explained_and_cancelled(stack: Stack) -> None:
    with stack.client() as client:
        slow = {"model": "echo", "prompt": "x", "options": {"first_token_ms": 20_000}}
        job_id = client.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": slow}).json()["id"]
    assert job_id in switchyard(stack, "jobs", "list", "--limit", "3")
    assert json.loads(switchyard(stack, "jobs", "show", job_id))["endpoint"] == "/v1/completions"
    explained = switchyard(stack, "jobs", "explain", job_id)
    assert "the only candidate left" in explained
    assert "tokenise" in explained
    assert "cancelled" in switchyard(stack, "jobs", "cancel", job_id)
    assert "deleted 1 of 1" in switchyard(stack, "jobs", "delete", job_id)
    assert "no job" in switchyard(stack, "jobs", "delete", job_id, status=1)
    assert "--ended" in switchyard(stack, "jobs", "delete", status=1)
    assert "deleted 0 of 0" in switchyard(stack, "jobs", "delete", "--ended", "--before", "2020-01-01")
    assert "no job" in switchyard(stack, "jobs", "show", "01a20979-8744-7650-870c-0098b145d576", status=1)


def test_cache_and_models(stack: Stack) -> None:
    with stack.client() as client:
        client.post("/v1/completions", json={"model": "echo", "prompt": "for the cache", "temperature": 0})
    assert json.loads(switchyard(stack, "cache", "stats", "--json"))[0]["entries"] >= 1
    assert "--all" in switchyard(stack, "cache", "purge", status=1)
    assert "removed" in switchyard(stack, "cache", "purge", "--model", "echo")
    models = {model["model"]: model["state"] for model in json.loads(switchyard(stack, "models", "--json"))}
    assert models["echo"] == "ready"
    assert models["away"] == "down"
