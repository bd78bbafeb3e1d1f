"""docs/api.md's lists of fields are what requests read, pass over and refuse. Run this file to write them anew."""

import re
import textwrap
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from anthropic.types import message_count_tokens_params as anthropic_counts
from anthropic.types import message_create_params as anthropic_messages
from openai.types import batch_create_params, completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from api import errors, schemas
from api.schemas import BODIES, ENDPOINTS
from tests.api.test_schemas import MINIMAL

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
ROUTES = [path for path in BODIES if not path.startswith("/admin/")]
CLIENTS: dict[str, tuple[type, set[str]]] = {
    # What the stock clients may send, and what they send without naming it there.
    "/v1/chat/completions": (chat_create_params.CompletionCreateParamsBase, {"stream"}),
    "/v1/completions": (completion_create_params.CompletionCreateParamsBase, {"stream"}),
    "/v1/embeddings": (embedding_create_params.EmbeddingCreateParams, set()),
    "/v1/responses": (response_create_params.ResponseCreateParamsBase, {"stream"}),
    "/v1/batches": (batch_create_params.BatchCreateParams, set()),
    "/v1/messages": (anthropic_messages.MessageCreateParamsBase, {"stream", "temperature", "top_k", "top_p"}),
    "/v1/messages/count_tokens": (anthropic_counts.MessageCountTokensParams, set()),
}
OURS = {"options", "webhook"}
IGNORED: dict[str, Any] = {
    "user": "u", "safety_identifier": "s", "prompt_cache_key": "p", "metadata": {"user_id": "v"},
}  # fmt: skip
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
Lists = tuple[tuple[str, ...], ...]
KINDS = ("honoured", "added", "ignored", "refused")


def expected(path: str) -> Lists:
    """The fields of a route by KINDS, as the code and the stock clients have them."""
    model = BODIES[path]
    names = [field.alias or name for name, field in model.model_fields.items()]
    refused = {name for name in model.no_effect if "." not in name}
    theirs = {name for name in names if name not in OURS}
    if path in CLIENTS:
        params, more = CLIENTS[path]
        theirs = set(get_type_hints(params)) | more
    ignored = {name for name in names if path in ENDPOINTS and name in IGNORED}
    return (
        tuple(name for name in names if name in theirs - ignored),
        tuple(name for name in names if name not in theirs | ignored),
        tuple(name for name in names if name in ignored),
        tuple(sorted((refused | theirs) - set(names))),
    )


def lists() -> str:
    paths_of: dict[Lists, list[str]] = {}
    for path in ROUTES:
        paths_of.setdefault(expected(path), []).append(path)
    parts = []
    for kinds, paths in paths_of.items():
        lines = [f"**{', '.join(f'`{path}`' for path in paths)}**", ""]
        for kind, names in zip(KINDS, kinds, strict=True):
            if names:
                line = f"- {kind}: {' '.join(f'`{name}`' for name in names)}"
                lines.append(textwrap.fill(line, 140, subsequent_indent="  ", break_on_hyphens=False))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def test_the_page_is_the_code() -> None:
    assert lists() in PAGE.read_text(), "write it anew: python -m tests.docs.test_fields"


@pytest.mark.parametrize("path", ROUTES)
def test_what_is_refused_is_refused_by_name(path: str) -> None:
    for name in expected(path)[KINDS.index("refused")]:
        with pytest.raises(errors.APIError) as raised:
            schemas.read(BODIES[path], BODY[path] | {name: {"asks": "something"}})
        assert (raised.value.code, raised.value.param) == ("unsupported_parameter", name)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_is_ignored_changes_no_call(path: str) -> None:
    plain = schemas.parse(path, BODY[path])
    for name in expected(path)[KINDS.index("ignored")]:
        assert schemas.parse(path, BODY[path] | {name: IGNORED[name]}) == plain, name


if __name__ == "__main__":
    before, rest = re.split(r"(?<=\n)(?=\*\*`/v1)", PAGE.read_text(), maxsplit=1)
    PAGE.write_text(before + lists() + rest[rest.index("\n## ") :])
