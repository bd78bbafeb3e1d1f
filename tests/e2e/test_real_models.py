"""The whole line with real models: SmolLM2 on Transformers and on vLLM, MiniLM and the Banking77 head.

fp32 and greedy, so that an answer can be compared word for word with an undisturbed one.
"""

import base64
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import numpy as np
import openai
import psutil
import pytest
from pydantic import BaseModel, Field

from tests.conftest import running
from tests.stack import ROOT, Stack

pytestmark = [pytest.mark.e2e, pytest.mark.models, pytest.mark.vllm, pytest.mark.timeout(400)]

CONFIG = """
backends:
  gpt: {runtime: gpt, concurrency: 16, options: {dtype: float32, max_batch_size: 16}}
  bert: {runtime: bert, concurrency: 64, options: {dtype: float32}}
  vllm: {runtime: vllm, concurrency: 16, options: {dtype: float32, max_num_seqs: 8, kv_cache_memory_gib: 0.25}}
models:
  on-both: {path: smollm2-135m-instruct, backends: [vllm, gpt], context_length: 512}
  on-gpt: {path: smollm2-135m-instruct, backends: [gpt], context_length: 512, auto: false}
  on-vllm: {path: smollm2-135m-instruct, backends: [vllm], context_length: 512, auto: false}
  all-minilm-l6-v2: {path: all-minilm-l6-v2, backends: [bert]}
  banking77: {path: banking77-minilm, backends: [bert]}
"""


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    yield from running(server_urls, tmp_path_factory.mktemp("models"), CONFIG, ["bert", "gpt", "vllm"])


def chat(model: str, text: str, **fields: Any) -> dict[str, Any]:
    fields = {"temperature": 0, "max_tokens": 24, **fields}
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("model", ["on-gpt", "on-vllm"])
def test_chat_answers_sensibly_streamed_and_not(stack: Stack, model: str) -> None:
    question = "What is the capital of France?"
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret, timeout=120) as client:
        whole = client.chat.completions.create(**chat(model, question))
        pieces = client.chat.completions.create(
            **chat(model, question, stream=True), extra_headers={"Cache-Control": "no-store"}
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
    assert "Paris" in whole.choices[0].message.content
    assert streamed == whole.choices[0].message.content
    assert whole.usage.prompt_tokens > 20


def test_both_runtimes_give_the_same_greedy_text(stack: Stack) -> None:
    with stack.client(timeout_s=120) as client:
        answers = {model: text_of(client.post("/v1/chat/completions", json=chat(model, "Name three colours.")))
                   for model in ("on-gpt", "on-vllm")}  # fmt: skip
    assert answers["on-gpt"] == answers["on-vllm"]


def test_auto_finds_a_generator_and_explains_both_candidates(stack: Stack) -> None:
    with stack.client(timeout_s=120) as client:
        response = client.post("/v1/chat/completions", json=chat("auto", "Say hello."))
        explained = client.get(f"/v1/jobs/{response.headers['x-job-id']}/explain").json()
    assert response.headers["x-model-used"] == "on-both"
    assert {candidate["backend"] for candidate in explained["decision"]["candidates"]} == {"gpt", "vllm"}
    assert explained["decision"]["chosen"]["score_ms"] == min(
        candidate["score_ms"] for candidate in explained["decision"]["candidates"]
    )


def test_many_chats_at_once_share_a_batch_and_answer_as_alone(stack: Stack) -> None:
    questions = [f"What is {number} plus {number}?" for number in range(1, 9)]
    no_store = {"Cache-Control": "no-store"}
    with stack.client(timeout_s=120) as client, ThreadPoolExecutor(8) as pool:
        for model in ("on-gpt", "on-vllm"):
            bodies = [chat(model, question, max_tokens=12) for question in questions]
            alone = [text_of(client.post("/v1/chat/completions", json=body, headers=no_store)) for body in bodies[:3]]
            together = list(
                pool.map(lambda body: text_of(client.post("/v1/chat/completions", json=body, headers=no_store)), bodies)
            )
            assert together[:3] == alone


@pytest.mark.parametrize("model", ["on-gpt", "on-vllm"])
def test_sampling_parameters_reach_the_model(stack: Stack, model: str) -> None:
    with stack.client(timeout_s=120) as client:
        forced = client.post("/v1/tokenize", json={"model": model, "prompt": " yes"}).json()["tokens"][-1]
        biased = chat(model, "Is it?", max_tokens=3, logit_bias={str(forced): 100}, logprobs=True, top_logprobs=2)
        choice = client.post("/v1/chat/completions", json=biased).json()["choices"][0]
        assert choice["message"]["content"].strip() == "yes yes yes"
        assert [len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]] == [2, 2, 2]
        seeded = chat(model, "Tell me a story.", temperature=1.0, seed=11, top_p=0.9, max_tokens=16)
        first, second = (text_of(client.post("/v1/chat/completions", json=seeded, headers={"Cache-Control": "no-store"}))
                         for _ in range(2))  # fmt: skip
        assert first == second
        stopped = client.post("/v1/chat/completions", json=chat(model, "Count from 1 to 9.", stop=["3"])).json()
        assert "3" not in stopped["choices"][0]["message"]["content"]


def test_an_overlong_prompt_is_refused_before_anything_is_stored(stack: Stack) -> None:
    before = stack.query("SELECT count(*) FROM jobs")
    with stack.client() as client:
        response = client.post("/v1/chat/completions", json=chat("on-both", "word " * 600))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert stack.query("SELECT count(*) FROM jobs") == before


def test_embeddings_equal_sentence_transformers(stack: Stack) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["How do I open an account?", "The weather is lovely today.", "日本語の文", "a " * 100]
    reference = SentenceTransformer(str(ROOT / "models/all-minilm-l6-v2"), device="cpu").encode(
        texts, normalize_embeddings=True
    )
    with stack.client() as client:
        body = {"model": "all-minilm-l6-v2", "input": texts}
        floats = client.post("/v1/embeddings", json=body).json()["data"]
        packed = client.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()["data"]
    ours = np.array([item["embedding"] for item in floats])
    assert (ours * reference).sum(axis=1).min() >= 0.9999
    decoded = np.array([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed])
    np.testing.assert_allclose(decoded, ours, atol=1e-6)


def test_classify_and_rerank(stack: Stack) -> None:
    with stack.client() as client:
        texts = ["My new card still has not arrived", "How do I top up my account by bank transfer?"]
        labels = client.post("/v1/classify", json={"model": "banking77", "input": texts}).json()["data"]
        documents = ["Bananas are rich in potassium.", "Paris is the capital of France.", "Berlin lies on the Spree."]
        asked = {"model": "auto", "query": "What is the capital of France?", "documents": documents, "top_n": 2}
        ranked = client.post("/v1/rerank", json=asked).json()["results"]
    assert labels[0]["label"] == "card_arrival"
    assert labels[0]["num_classes"] == 77
    assert ranked[0]["index"] == 1
    assert len(ranked) == 2


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)
    trade: Literal["baker", "smith", "miller"]


@pytest.mark.parametrize("model", ["on-gpt", "on-vllm"])
def test_an_answer_has_the_form_asked_for(stack: Stack, model: str) -> None:
    asked = chat(model, "Tell me about a person.", max_tokens=120)
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.secret, timeout=120) as client:
        choice = client.chat.completions.parse(**asked, response_format=Person).choices[0]
        form = {"structured_outputs": {"regex": r"[A-Z]{2}/[0-9]{3}"}}
        matched = client.chat.completions.create(**asked, extra_body=form).choices[0]
    assert choice.message.parsed is not None
    assert choice.finish_reason == "stop"
    assert re.fullmatch(r"[A-Z]{2}/[0-9]{3}", matched.message.content or "")


FIVE = {"type": "array", "minItems": 5, "maxItems": 5, "items": Person.model_json_schema()}


@pytest.mark.parametrize("backend", ["gpt", pytest.param("vllm", marks=pytest.mark.long)])
def test_streams_survive_the_death_of_their_worker(stack: Stack, backend: str) -> None:
    free = chat(f"on-{backend}", "Tell me a long story about a river and a mill.", max_tokens=120)
    formed = chat(f"on-{backend}", "Who?", max_tokens=300, structured_outputs={"json": FIVE})
    no_store = {"Cache-Control": "no-store"}
    with stack.client(timeout_s=300) as client:
        undisturbed = [
            text_of(client.post("/v1/chat/completions", json=asked, headers=no_store)) for asked in (free, formed)
        ]
    streams = [stack.read_stream("/v1/chat/completions", asked, **no_store) for asked in (free, formed)]
    for stream in streams:
        stream.wait_for(24)
    children = psutil.Process(stack.processes[backend].pid).children(recursive=True)
    stack.kill(backend)
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, "a worker's children must not outlive it"
    stack.start_worker(backend, wait_s=240)
    assert [stream.text(within_s=200) for stream in streams] == undisturbed
    assert len([Person.model_validate(one) for one in json.loads(undisturbed[1])]) == 5
    assert stack.query("SELECT attempt FROM jobs WHERE is_stream ORDER BY created_at DESC LIMIT 2") == [(2,), (2,)]
