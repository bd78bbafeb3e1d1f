"""The lines of a batch, however the file is cut into chunks."""

import itertools
import json
import random
from typing import Any

import pytest

import catalog
from api import errors
from api.batch_lines import Mistake, Raw, Splitter, check, refused

CONFIG = """
backends: {a: {runtime: echo}}
models: {a: {path: a, backends: [a], aliases: [other]}, b: {path: b, backends: [a]}}
"""
MOST = 20 + 4096


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> catalog.Catalog:
    path = tmp_path_factory.mktemp("lines") / "switchyard.yaml"
    path.write_text(CONFIG)
    return catalog.load(path, path.parent)


def split(content: bytes, cuts: list[int]) -> list[Raw]:
    splitter = Splitter(20)
    edges = [0, *cuts, len(content)]
    found = [raw for at, end in itertools.pairwise(edges) for raw in splitter.feed(content[at:end])]
    return [*found, *splitter.end()]


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_lines_are_the_same_however_the_file_is_cut(end: bytes) -> None:
    texts = [b"one", b"", b"  ", b"x" * MOST, b"x" * (MOST + 1), b"\r", "größe".encode(), b"last"]
    content = b"\n".join(texts) + end
    whole = split(content, [])
    assert [(raw.number, raw.text) for raw in whole] == [
        (1, b"one"), (4, b"x" * MOST), (5, None), (7, "größe".encode()), (8, b"last"),
    ]  # fmt: skip
    assert all(content[raw.start : raw.start + raw.num_bytes] == raw.text for raw in whole if raw.text is not None)
    choose = random.Random(11)
    for _ in range(200):
        cuts = sorted(choose.sample(range(len(content)), choose.randint(1, 12)))
        assert split(content, cuts) == whole


def line(endpoint: str, **body: Any) -> Raw:
    text = json.dumps({"custom_id": "x", "method": "POST", "url": endpoint, "body": body}).encode()
    return Raw(1, 0, text)


def test_a_model_outside_the_keys_scope_does_not_exist(served: catalog.Catalog) -> None:
    narrowed = served.narrowed(["a"])
    assert check(line("/v1/embeddings", model="other"), "/v1/embeddings", narrowed) == ("x", "other")
    assert check(line("/v1/embeddings", model="b"), "/v1/embeddings", served) == ("x", "b")
    with pytest.raises(Mistake) as caught:
        check(line("/v1/embeddings", model="b"), "/v1/embeddings", narrowed)
    assert caught.value.code == "model_not_found"


def test_where_an_endpoint_needs_no_model_a_line_needs_none(served: catalog.Catalog) -> None:
    assert check(line("/embed", inputs="x"), "/embed", served) == ("x", "auto")
    with pytest.raises(Mistake) as caught:
        check(line("/v1/embeddings", input="x"), "/v1/embeddings", served)
    assert caught.value.param == "body.model"


@pytest.mark.parametrize(
    ("endpoint", "status", "body"),
    [
        ("/v1/score", 400, {"error": {"message": "No.", "type": "invalid_request_error", "param": None,
                                      "code": "validation_error"}}),
        ("/embed", 422, {"error": "No.", "error_type": "Validation"}),
        ("/v1/messages", 400, {"type": "error", "error": {"type": "invalid_request_error", "message": "No."},
                               "request_id": "r"}),
    ],
)  # fmt: skip
def test_a_refused_line_has_the_form_of_its_endpoint(endpoint: str, status: int, body: dict[str, Any]) -> None:
    written = json.loads(refused("r", "x", errors.InvalidValue("No."), endpoint))
    assert written == {
        "id": "r", "custom_id": "x", "response": {"status_code": status, "request_id": "r", "body": body}, "error": None,
    }  # fmt: skip
