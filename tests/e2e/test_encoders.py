"""Scores, and the routes of text-embeddings-inference, through real processes."""

from typing import Any

import httpx
import pytest

from tests.stack import Stack

pytestmark = pytest.mark.e2e


def scores(stack: Stack, **body: Any) -> list[float]:
    with stack.client() as client:
        response = client.post("/v1/score", json={"model": "echo", **body})
    assert response.status_code == 200, response.text
    found = response.json()
    assert found["id"] == "score-" + response.headers["x-job-id"].replace("-", "")
    assert (found["object"], found["model"]) == ("list", "echo")
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 0
    assert [(item["index"], item["object"]) for item in found["data"]] == [
        (index, "score") for index in range(len(found["data"]))
    ]
    return [item["score"] for item in found["data"]]


def test_scores_of_one_query_and_of_pairs(stack: Stack) -> None:
    """Echo's score is the share of the query's bytes that the document has."""
    assert scores(stack, queries="ab", documents="a") == [0.5]
    assert scores(stack, data_1="ab", data_2=["x", "a", "ba"]) == [0.0, 0.5, 1.0]
    assert scores(stack, text_1=["ab", "cd", "ef"], text_2=["ab", "c", "x"]) == [1.0, 0.5, 0.0]
    assert scores(stack, queries=["ab"], items=["a"]) == [0.5]


def test_a_score_is_a_job_like_any_other(stack: Stack) -> None:
    asked = {"endpoint": "/v1/score", "body": {"model": "echo", "queries": ["ab", "cd"], "documents": ["a", "c"]}}
    with stack.client() as client:
        path = client.post("/v1/jobs", json=asked).headers["location"]
        assert client.get(path, params={"wait": 10}).json()["status"] == "succeeded"
        stored = client.get(f"{path}/result")
        again = client.post("/v1/score", json=asked["body"])
    assert again.headers["x-cache"] == "HIT"
    assert again.content == stored.content
    refused = {"model": "echo", "queries": ["a", "b"], "documents": ["c"], "options": {"fail": "invalid"}}
    with stack.client() as client:
        assert client.post("/v1/score", json=refused).json()["error"]["param"] == "queries"
        pairs = client.post("/v1/score", json=refused | {"documents": ["c", "d"]})
    assert (pairs.status_code, pairs.json()["error"]["code"]) == (400, "invalid_request")


def test_coheres_path_ranks_as_ours_does(stack: Stack) -> None:
    asked = {"model": "echo", "query": "ab", "documents": ["x", "a", "ba"]}
    with stack.client() as client:
        first, second = (client.post(path, json=asked) for path in ("/v1/rerank", "/v2/rerank"))
    assert (second.headers["x-cache"], second.content) == ("HIT", first.content)
    assert [one["index"] for one in second.json()["results"]] == [2, 1, 0]


def test_routes_of_text_embeddings_inference(stack: Stack) -> None:
    with stack.client() as client:

        def post(path: str, **body: Any) -> Any:
            response = client.post(path, json=body)
            assert response.status_code == 200, response.text
            return response.json()

        vectors = post("/embed", inputs=["one", "two"])
        openais = client.post("/v1/embeddings", json={"model": "echo", "input": ["one", "two"]}).json()["data"]
        assert vectors == [item["embedding"] for item in openais]
        assert [len(vector) for vector in post("/embed", inputs="one", dimensions=4)] == [4]
        ranked = post("/rerank", query="ab", texts=["x", "ba", "a"], return_text=True)
        assert ranked == [{"index": 1, "score": 1.0, "text": "ba"}, {"index": 2, "score": 0.5, "text": "a"},
                          {"index": 0, "score": 0.0, "text": "x"}]  # fmt: skip
        assert post("/rerank", query="ab", texts=["x", "ba"]) == [
            {"index": 1, "score": 1.0},
            {"index": 0, "score": 0.0},
        ]
        one = post("/predict", inputs="one")
        assert {entry["label"] for entry in one} == {"LABEL_0", "LABEL_1"}
        assert one[0]["score"] > one[1]["score"]
        assert post("/predict", inputs=[["one"], ["two"]])[0] == one
        pair = post("/predict", inputs=["one", "two"])
        assert post("/predict", inputs=[["one", "two"]]) == [pair]
        assert pair == post("/predict", inputs="onetwo"), "echo reads a pair's bytes one after the other"


def test_errors_of_text_embeddings_inference(stack: Stack) -> None:
    with stack.client() as client:
        cases: list[tuple[str, dict[str, Any], int, str]] = [
            ("/embed", {"inputs": ""}, 400, "Empty"),
            ("/embed", {"inputs": 7}, 422, "Validation"),
            ("/embed", {"inputs": "x", "truncate": True}, 422, "Validation"),
            ("/embed", {"inputs": "x" * 5000}, 422, "Validation"),
            ("/predict", {"inputs": ["a", "b", "c"]}, 422, "Validation"),
            ("/rerank", {"query": "q"}, 422, "Validation"),
            ("/rerank", {"query": "q", "texts": ["x"], "model": "away"}, 503, "Unhealthy"),
            ("/embed", {"inputs": "x", "options": {"fail": "error"}}, 424, "Backend"),
            ("/embed", {"inputs": "x", "model": "no-such-model"}, 404, "NotFound"),
        ]
        for path, body, status, kind in cases:
            response = client.post(path, json={"model": "echo", **body})
            assert (response.status_code, response.json().keys()) == (status, {"error", "error_type"}), path
            assert response.json()["error_type"] == kind
        assert "truncate" in client.post("/embed", json={"inputs": "x", "truncate": True}).json()["error"]
        unnamed = client.post("/embed", content=b"{", headers={"Content-Type": "application/json"})
        assert (unnamed.status_code, unnamed.json()["error_type"]) == (422, "Validation")
        assert client.get("/embed").json().keys() == {"error", "error_type"}
    assert httpx.post(f"{stack.url}/embed", json={}).json()["error_type"] == "Unauthorized"


def test_info_describes_a_model(stack: Stack) -> None:
    with stack.client() as client:
        found = client.get("/info", params={"model": "echo"}).json()
        assert found["model_id"] == client.get("/info").json()["model_id"] == "echo"
        assert (found["max_input_length"], found["max_client_batch_size"]) == (4096, 64)
        assert list(found["model_type"]) == ["embedding"]
        missing = client.get("/info", params={"model": "none"})
    assert (missing.status_code, missing.json()["error_type"]) == (404, "NotFound")


def test_paths_of_vllm_for_tokens(stack: Stack) -> None:
    with stack.client() as client:
        for prefix in ("", "/v1"):
            tokens = client.post(f"{prefix}/tokenize", json={"model": "echo", "prompt": "é"}).json()["tokens"]
            text = client.post(f"{prefix}/detokenize", json={"model": "echo", "tokens": tokens}).json()
            assert (tokens, text) == ([195, 169], {"prompt": "é"})
