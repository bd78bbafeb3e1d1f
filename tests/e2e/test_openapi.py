"""The API's own description, held to it by requests made from it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.app import create_app
from api.description import OPEN
from tests.conftest import ECHO, running
from tests.stack import Stack

pytestmark = pytest.mark.e2e

EXAMPLES = os.environ.get("SWITCHYARD_FUZZ_EXAMPLES")
"""Per operation; `make fuzz-api` asks for many, and for others each time. Else they are few and the same."""
WORKERS = "1"
"""With two, ast.parse, by which hypothesis reads code, now and then fails: CPython counts its depth for all threads."""
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("openapi"), ECHO, ["echo"])


def description(stack: Stack) -> dict[str, Any]:
    """As it is served, without what would hang the echo backend or call a stranger's address."""

    def harmless(schema: Any) -> Any:
        if isinstance(schema, list):
            return [harmless(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        kept = {name: harmless(value) for name, value in schema.items()}
        if isinstance(properties := kept.get("properties"), dict):
            kept["properties"] = {
                name: value for name, value in properties.items() if name not in ("options", "webhook")
            }
        return kept

    found: dict[str, Any] = harmless(httpx.get(f"{stack.url}/openapi.json").json())
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_requests_made_from_the_description_are_answered_as_it_says(stack: Stack, tmp_path: Path) -> None:
    secret = stack.create_key("operators", is_admin=True)
    (tmp_path / "openapi.json").write_text(json.dumps(description(stack)))
    generation = ["--max-examples", EXAMPLES] if EXAMPLES else ["--max-examples", "2", "--generation-deterministic"]
    done = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"), "run", "openapi.json", "--url", stack.url,
            "--header", f"Authorization: Bearer {secret}", "--request-timeout", "60", "--workers", WORKERS,
            "--checks", CHECKS, "--phases", "coverage,fuzzing", *generation, "--suppress-health-check", "all", "--no-color",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print("Test cases:" + done.stdout.rpartition("Test cases:")[2])
    assert done.returncode == 0, done.stdout.replace(secret, "…")[-12_000:] + done.stderr[-2000:]
    assert "internal_error" not in (stack.logs / "gateway.log").read_text()


def test_the_description_has_every_kind_of_answer() -> None:
    for path, operations in create_app().openapi()["paths"].items():
        for operation in operations.values():
            assert {"4XX", "5XX"} < set(operation["responses"]), path
            assert "422" not in operation["responses"]
            assert (operation.get("security") == []) == (path in OPEN)
