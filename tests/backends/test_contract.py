"""One suite for every backend: what `backends.base` promises, whichever runtime keeps it."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

import catalog
import settings
from backends.base import Backend, BackendError, Chunk, EncodeCall, GenerateCall, InvalidCall, SamplingParams
from backends.registry import backend_class
from catalog import BackendSpec, ModelSpec

CONFIG = """
backends:
  echo: {runtime: echo}
  gpt: {runtime: gpt, options: {dtype: float32, max_batch_size: 8}}
  bert: {runtime: bert, options: {dtype: float32}}
  vllm: {runtime: vllm, options: {dtype: float32, max_num_seqs: 8, kv_cache_memory_gib: 0.25}}
models:
  echo: {path: echo, backends: [echo], context_length: 512}
  smollm2-135m-instruct: {path: smollm2-135m-instruct, backends: [gpt, vllm], context_length: 512}
  all-minilm-l6-v2: {path: all-minilm-l6-v2, backends: [bert]}
  banking77: {path: banking77-minilm, backends: [bert]}
"""


def spec_of(name: str, folder: Path) -> BackendSpec:
    file = folder / "switchyard.yaml"
    file.write_text(CONFIG)
    return catalog.load(file, settings.load().models_dir).backends[name]


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Backend]:
    spec = spec_of(request.cls.name, tmp_path_factory.mktemp("contract"))
    started = backend_class(spec.runtime)(spec)
    await started.start()
    yield started
    await started.stop()


def tokens_of(model: ModelSpec, text: str) -> list[int]:
    if model.path == "echo":
        return list(text.encode())
    tokenizer: Any = Tokenizer.from_file(str(Path(model.path) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return list(tokenizer.encode(text).ids)


def call_for(model: ModelSpec, text: str, name: str = "call", **fields: Any) -> GenerateCall:
    resumed = fields.pop("resumed_token_ids", ())
    is_streaming = fields.pop("is_streaming", True)
    options = {"token_ms": 1} if model.path == "echo" else {}
    params = SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **fields})
    return GenerateCall(name, model.name, tokens_of(model, text), params, is_streaming, resumed, options)


async def run(backend: Backend, call: GenerateCall) -> list[Chunk]:
    return [chunk async for chunk in backend.generate(call)]


def joined(chunks: list[Chunk]) -> tuple[str, list[int]]:
    return "".join(c.text for c in chunks), [token for c in chunks for token in c.token_ids]


PROMPTS = ["The capital of France is", "Once upon a time", "2 + 2 =", "Ünïcödé ist schön, weil"]


class Generates:
    name: str

    pytestmark = pytest.mark.asyncio(loop_scope="class")

    async def test_only_the_last_chunk_has_a_finish_reason(self, backend: Backend) -> None:
        chunks = await run(backend, call_for(backend.spec.models[0], PROMPTS[0]))
        assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert len(chunks) > 1

    async def test_streaming_or_not_gives_the_same(self, backend: Backend) -> None:
        model = backend.spec.models[0]
        whole = await run(backend, call_for(model, PROMPTS[3], is_streaming=False))
        pieces = await run(backend, call_for(model, PROMPTS[3], is_streaming=True))
        assert joined(whole) == joined(pieces)
        assert whole[-1].finish_reason == pieces[-1].finish_reason

    async def test_many_at_once_answer_as_each_alone(self, backend: Backend) -> None:
        model = backend.spec.models[0]
        alone = [joined(await run(backend, call_for(model, prompt))) for prompt in PROMPTS]
        calls = [call_for(model, prompt, f"call-{number}") for number, prompt in enumerate(PROMPTS)]
        together = await asyncio.gather(*[run(backend, call) for call in calls])
        assert [joined(chunks) for chunks in together] == alone

    async def test_max_tokens_is_kept_and_named(self, backend: Backend) -> None:
        for limit in (1, 3):
            chunks = await run(backend, call_for(backend.spec.models[0], PROMPTS[1], max_tokens=limit))
            assert len(joined(chunks)[1]) == limit
            assert chunks[-1].finish_reason == "length"

    async def test_an_attempt_goes_on_where_another_stopped(self, backend: Backend) -> None:
        model = backend.spec.models[0]
        text, tokens = joined(await run(backend, call_for(model, PROMPTS[0])))
        head = await run(backend, call_for(model, PROMPTS[0], max_tokens=5))
        rest = await run(backend, call_for(model, PROMPTS[0], resumed_token_ids=tuple(tokens[:5])))
        assert joined(head)[1] + joined(rest)[1] == tokens
        assert joined(head)[0] + joined(rest)[0] == text

    async def test_its_steps_are_counted_whether_it_streams_or_not(self, backend: Backend) -> None:
        """A worker takes a backend whose calls run without a step for hung."""
        model = backend.spec.models[0]
        for is_streaming in (True, False):
            before = backend.num_steps()
            await run(backend, call_for(model, PROMPTS[0], max_tokens=4, is_streaming=is_streaming))
            assert backend.num_steps() > before

    async def test_a_closed_stream_leaves_room_for_others(self, backend: Backend) -> None:
        model = backend.spec.models[0]
        streams = [
            backend.generate(call_for(model, PROMPTS[1], f"left-{number}", max_tokens=200)) for number in range(8)
        ]
        await asyncio.gather(*[anext(stream) for stream in streams])
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]
        chunks = await asyncio.wait_for(run(backend, call_for(model, PROMPTS[2])), 20)
        assert chunks[-1].finish_reason is not None

    async def test_a_cancelled_reader_leaves_room_for_others(self, backend: Backend) -> None:
        model = backend.spec.models[0]
        begun = asyncio.Event()

        async def read() -> None:
            async with contextlib.aclosing(
                backend.generate(call_for(model, PROMPTS[1], "gone", max_tokens=200))
            ) as all_:  # type: ignore[type-var]
                async for _ in all_:
                    begun.set()

        reader = asyncio.create_task(read())
        await asyncio.wait_for(begun.wait(), 20)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert joined(await run(backend, call_for(model, PROMPTS[2], "gone")))[1]

    async def test_what_it_cannot_do_is_refused(self, backend: Backend) -> None:
        if "embed" not in backend.capabilities.tasks:
            with pytest.raises(InvalidCall):
                await backend.embed(EncodeCall("x", backend.spec.models[0].name, [[1]]))

    async def test_it_is_healthy(self, backend: Backend) -> None:
        backend.check_health()


class Encodes:
    name: str

    pytestmark = pytest.mark.asyncio(loop_scope="class")

    async def test_embeddings_are_unit_vectors_that_company_does_not_change(self, backend: Backend) -> None:
        model = backend.spec.models[0]
        inputs = [tokens_of(model, text) for text in [*PROMPTS, "a much longer text " * 12]]
        together = await backend.embed(EncodeCall("all", model.name, inputs))
        assert together.dtype == np.float32
        assert together.shape[0] == len(inputs)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
        alone = await asyncio.gather(
            *[backend.embed(EncodeCall(f"one-{index}", model.name, [tokens])) for index, tokens in enumerate(inputs)]
        )
        np.testing.assert_allclose(np.concatenate(alone), together, atol=2e-5)

    async def test_its_steps_are_counted(self, backend: Backend) -> None:
        before = backend.num_steps()
        await backend.embed(EncodeCall("steps", backend.spec.models[0].name, [[1, 2]]))
        assert backend.num_steps() > before

    async def test_dimensions_shorten_and_stay_unit(self, backend: Backend) -> None:
        model = backend.spec.models[0]
        tokens = [tokens_of(model, PROMPTS[0])]
        full = await backend.embed(EncodeCall("full", model.name, tokens))
        short = await backend.embed(EncodeCall("short", model.name, tokens, dimensions=8))
        assert short.shape == (1, 8)
        np.testing.assert_allclose(short, full[:, :8] / np.linalg.norm(full[:, :8]), atol=1e-5)

    async def test_probabilities_sum_to_one(self, backend: Backend) -> None:
        model = backend.spec.models[-1]
        shares = await backend.classify(EncodeCall("c", model.name, [tokens_of(model, "my card has not arrived")]))
        np.testing.assert_allclose(shares.sum(axis=1), 1.0, atol=1e-4)
        assert shares.shape == (1, len(model.labels) or 2)

    async def test_the_matching_document_ranks_first(self, backend: Backend) -> None:
        model = backend.spec.models[0]
        texts = ["capital of France", "bananas", "the capital of France is Paris"]
        scores = await backend.rerank(EncodeCall("r", model.name, [tokens_of(model, text) for text in texts]))
        assert scores.shape == (2,)
        assert scores[1] > scores[0]


COUNTRY = """start: %json {"type": "object", "properties": {"country": {"enum": ["France", "Italy"]}, "capital":
    {"type": "string", "maxLength": 20}, "rank": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["country", "capital", "rank"], "additionalProperties": false,
    "x-guidance": {"whitespace_flexible": false, "item_separator": ", ?", "key_separator": ": ?"}}"""


COSTLY = {
    # Too many at one place, seen as a token is taken.
    "rules": 'start: "begin " all\nall: {}\n{}'.format(
        " | ".join(f"r{number}" for number in range(2500)),
        "\n".join(f'r{number}: "x" "{number}"' for number in range(2500)),
    ),
    # Too many states, seen as the next tokens are looked for.
    "characters": 'start: "begin " /(.*a.{60}|.*b.{55}[a-z].*c.{30}|.*d.{44}e.{33}f.{22}.*|(.*[a-f].{33}[g-z]){9})/',
}


class Constrains:
    """Of a backend whose text follows a grammar."""

    name: str

    pytestmark = pytest.mark.asyncio(loop_scope="class")

    @pytest.mark.parametrize("temperature", [0.0, 2.0])
    async def test_json_is_valid_however_it_is_sampled(self, backend: Backend, temperature: float) -> None:
        call = call_for(backend.spec.models[0], PROMPTS[0], max_tokens=90, grammar=COUNTRY, temperature=temperature)
        chunks = await run(backend, replace(call, params=replace(call.params, seed=3)))
        found = json.loads(joined(chunks)[0])
        assert found.keys() == {"country", "capital", "rank"}
        assert found["country"] in ("France", "Italy")
        assert 1 <= found["rank"] <= 99
        assert chunks[-1].finish_reason == "stop"

    @pytest.mark.parametrize(
        ("grammar", "pattern"),
        [
            ('start: "yes, certainly" | "no, never"', "yes, certainly|no, never"),
            (r"start: /[A-Z]{3}\/[0-9]{2}/", r"[A-Z]{3}/[0-9]{2}"),
            ('root ::= "[" digit ("," digit)? "]"\ndigit ::= [0-9]', r"\[[0-9](,[0-9])?\]"),
        ],
    )
    async def test_other_forms(self, backend: Backend, grammar: str, pattern: str) -> None:
        text, _ = joined(
            await run(backend, call_for(backend.spec.models[0], PROMPTS[2], max_tokens=40, grammar=grammar))
        )
        assert re.fullmatch(pattern, text)

    async def test_the_grammar_goes_on_wherever_an_attempt_stopped(self, backend: Backend) -> None:
        model = backend.spec.models[0]
        text, tokens = joined(await run(backend, call_for(model, PROMPTS[0], max_tokens=90, grammar=COUNTRY)))
        cuts = [tuple(tokens[:cut]) for cut in range(1, len(tokens) + 1)]
        calls = [call_for(model, PROMPTS[0], f"cut-{len(cut)}", max_tokens=90, grammar=COUNTRY, resumed_token_ids=cut)
                 for cut in cuts]  # fmt: skip
        for cut, chunks in zip(cuts, await asyncio.gather(*[run(backend, call) for call in calls]), strict=True):
            assert [*cut, *joined(chunks)[1]] == tokens
            assert text.endswith(joined(chunks)[0])
            assert chunks[-1].finish_reason == "stop"

    async def test_tokens_that_do_not_follow_the_grammar_are_not_gone_on_from(self, backend: Backend) -> None:
        model = backend.spec.models[0]
        foreign = tuple(tokens_of(model, "Once upon"))
        with pytest.raises(BackendError):
            await run(backend, call_for(model, PROMPTS[0], "foreign", grammar=COUNTRY, resumed_token_ids=foreign))
        assert joined(await run(backend, call_for(model, PROMPTS[0], "after", grammar='start: "ok"')))[0] == "ok"

    async def test_company_with_and_without_grammars(self, backend: Backend) -> None:
        model = backend.spec.models[0]
        fields: list[dict[str, Any]] = [{}, {"grammar": COUNTRY, "max_tokens": 60}, {"grammar": 'start: "a" | "b"'}, {}]
        calls = [call_for(model, PROMPTS[0], f"mixed-{number}", **one) for number, one in enumerate(fields)]
        alone = [joined(await run(backend, call)) for call in calls]
        assert [joined(chunks) for chunks in await asyncio.gather(*[run(backend, call) for call in calls])] == alone

    async def test_grammars_that_are_slow_to_compile_do_not_hold_up_the_loop(self, backend: Backend) -> None:
        """All of them take seconds; the worker's heartbeats have to go on."""
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(11):
            schema = {"type": "object", "properties": {"a": schema, "b": schema}, "additionalProperties": False}
        grammar = f"start: %json {json.dumps(schema)}"
        calls = [call_for(backend.spec.models[0], PROMPTS[0], f"slow-{number}", grammar=grammar) for number in range(6)]
        longest, before = 0.0, time.monotonic()
        running = asyncio.gather(*[run(backend, call) for call in calls])
        while not running.done():
            await asyncio.sleep(0.01)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
        assert all(joined(chunks)[0].startswith("{") for chunks in await running)
        assert longest < 1.0

    @pytest.mark.parametrize("kind", ["rules", "characters"])
    async def test_a_grammar_out_of_bounds_fails_and_harms_nobody(self, backend: Backend, kind: str) -> None:
        """Out of llguidance's bounds only after some text, so that no check beforehand can see it."""
        model = backend.spec.models[0]
        calls = [call_for(model, PROMPTS[0], f"costly-{attempt}", grammar=COSTLY[kind], max_tokens=200, temperature=2.0)
                 for attempt in range(4)]  # fmt: skip
        seeded = [replace(call, params=replace(call.params, seed=seed)) for seed, call in enumerate(calls)]
        ended = await asyncio.gather(*[run(backend, call) for call in seeded], return_exceptions=True)
        assert [isinstance(one, BackendError) for one in ended] == [True] * 4, ended
        backend.check_health()
        assert joined(await run(backend, call_for(model, PROMPTS[0], "after", grammar='start: "ok"')))[0] == "ok"


class TestEcho(Generates, Encodes):
    name = "echo"


@pytest.mark.models
class TestGPT(Generates, Constrains):
    name = "gpt"


@pytest.mark.models
class TestBERT(Encodes):
    name = "bert"


@pytest.mark.models
@pytest.mark.vllm
class TestVLLM(Generates, Constrains):
    name = "vllm"


@pytest.mark.parametrize("runtime", ["echo", "gpt", "bert", "vllm"])
def test_importing_a_backend_imports_no_runtime(runtime: str) -> None:
    """The gateway reads capabilities from these classes and must stay small."""
    code = (
        "import sys; from backends.registry import backend_class; "
        f"backend_class({runtime!r}); import api.app; "
        "sys.exit(bool({'torch', 'transformers', 'vllm'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
