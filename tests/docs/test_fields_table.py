"""The table of fields in docs/api.md is what the wire models say. Run this file to print the table anew."""

from pathlib import Path
from typing import Any

import pytest

from api import schemas
from api.schemas.fields import WireModel

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
OURS = {"options", "deadline", "timeout_s", "endpoint", "body"}
"""In no other API under these names; `metadata` of a job and text-embeddings-inference's `model` apart."""
UNUSED = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "p", "metadata": {"k": "v"}}
"""Accepted, and without effect on the call."""
ROUTES = {
    **schemas.ENDPOINTS,
    **{path: model for path, model in schemas._OTHER_BODIES.items() if path not in ("/tokenize", "/detokenize")},
}


def is_ours(path: str, field: str) -> bool:
    return field in OURS or path == "/v1/jobs" or (field == "model" and not path.startswith("/v1/"))


def is_unused(path: str, field: str) -> bool:
    return path != "/v1/jobs" and field in UNUSED


def fields_of(model: type[WireModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def cell(names: list[str]) -> str:
    return " ".join(f"`{name}`" for name in names) or "–"


def row(path: str, model: type[WireModel]) -> str:
    fields = fields_of(model)
    honoured = [name for name in fields if not is_ours(path, name) and not is_unused(path, name)]
    cells = [
        honoured,
        [name for name in fields if is_unused(path, name)],
        [name for name in fields if is_ours(path, name)],
        sorted(model.no_effect),
    ]
    return f"| `{path}` | {' | '.join(map(cell, cells))} |"


def table() -> str:
    head = ["| route | honoured | accepted, no effect | ours | refused by name |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *(row(path, model) for path, model in ROUTES.items())]) + "\n"


def test_the_table_is_the_code() -> None:
    assert table() in PAGE.read_text(), "print it with `python -m tests.docs.test_fields_table`"


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"model": "m", "prompt": "x"},
    "/v1/embeddings": {"model": "m", "input": "x"},
}


@pytest.mark.parametrize("path", BODIES)
def test_what_is_said_to_have_no_effect_has_none(path: str) -> None:
    plain = schemas.parse(path, BODIES[path])
    unused = [name for name in fields_of(ROUTES[path]) if is_unused(path, name)]
    assert unused
    for name in unused:
        assert schemas.parse(path, BODIES[path] | {name: UNUSED[name]}) == plain


if __name__ == "__main__":
    print(table())
