"""docs/api.md's lists of fields are what the requests read, refuse, and add to what other APIs have."""

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from anthropic.types import message_count_tokens_params as anthropic_counts
from anthropic.types import message_create_params as anthropic_messages
from openai.types import batch_create_params, completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from api import errors, schemas
from api.schemas import BODIES
from tests.api.test_schemas import MINIMAL

API = Path(__file__).parents[2] / "docs" / "api.md"
ROUTES = {path for path in BODIES if not path.startswith("/admin/")}
CLIENTS: dict[str, tuple[type, set[str]]] = {
    # What the stock clients may send, and what they send without naming it among these.
    "/v1/chat/completions": (chat_create_params.CompletionCreateParamsBase, {"stream"}),
    "/v1/completions": (completion_create_params.CompletionCreateParamsBase, {"stream"}),
    "/v1/embeddings": (embedding_create_params.EmbeddingCreateParams, set()),
    "/v1/responses": (response_create_params.ResponseCreateParamsBase, {"stream"}),
    "/v1/batches": (batch_create_params.BatchCreateParams, set()),
    "/v1/messages": (anthropic_messages.MessageCreateParamsBase, {"stream", "temperature", "top_k", "top_p"}),
    "/v1/messages/count_tokens": (anthropic_counts.MessageCountTokensParams, set()),
}

TEXT = {"model": "m", "prompt": "hi"}
BODY: dict[str, dict[str, Any]] = MINIMAL | {
    "/v1/jobs": {"endpoint": "/v1/completions", "body": TEXT},
    "/v1/responses": {"model": "m", "input": "hi"},
    "/v1/batches": {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"},
    "/v1/messages/count_tokens": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/tokenize": TEXT,
    "/tokenize": TEXT,
    "/v1/detokenize": {"model": "m", "tokens": [1]},
    "/detokenize": {"model": "m", "tokens": [1]},
}


def expected(path: str) -> list[set[str]]:
    """Taken as the API's own client sends them, taken beyond that, refused."""
    model = BODIES[path]
    names = {field.alias or name for name, field in model.model_fields.items()}
    refused = {name for name in model.no_effect if "." not in name} - names
    if path not in CLIENTS:
        return [names, set(), refused]
    params, more = CLIENTS[path]
    theirs = set(get_type_hints(params)) | more
    return [names & theirs, names - theirs, refused | (theirs - names)]


def written() -> dict[str, list[set[str]]]:
    text = API.read_text().split("\n## Fields\n")[1].split("\n## ")[0]
    rows: dict[str, list[set[str]]] = {}
    for paths, lines in re.findall(r"^\*\*(`.*`)\*\*\n\n((?:.+\n)+)", text, re.MULTILINE):
        told = dict(re.findall(r"- (\w+): ((?:.|\n(?!- ))+)", lines))
        for path in re.findall(r"`(.+?)`", paths):
            rows[path] = [set(re.findall(r"`(\w+)`", told.get(kind, ""))) for kind in ("taken", "added", "refused")]
    return rows


def test_every_route_with_a_body_has_its_list() -> None:
    assert written().keys() == ROUTES


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_the_list_is_what_the_code_reads(path: str) -> None:
    assert written()[path] == expected(path)


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_what_the_list_calls_refused_is_refused_by_name(path: str) -> None:
    for name in written()[path][2]:
        with pytest.raises(errors.APIError) as raised:
            schemas.read(BODIES[path], BODY[path] | {name: {"asks": "something"}})
        assert (raised.value.code, raised.value.param) == ("unsupported_parameter", name)
