"""The GPT backend against Transformers' own `generate`, and the promises of its batching.

Tiny random models stand for architectures and for faults; the real one for text. Nothing waits for time:
what has to happen first is observed through the chunks of a running sequence.
"""

import asyncio
import contextlib
import math
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import pytest_asyncio
import torch
import transformers
from tokenizers import Tokenizer

import catalog
import settings
from backends.base import BackendDead, BackendError, Chunk, GenerateCall, InvalidCall, SamplingParams
from backends.gpt_backend import GPTBackend
from backends.gpt_model import Piece, RaggedRunner, SerialRunner, load
from backends.sampling import Sampler, sample
from backends.text import Detokenizer

pytestmark = pytest.mark.models
in_module_loop = pytest.mark.asyncio(loop_scope="module")

_REAL = settings.load().models_dir.absolute() / "smollm2-135m-instruct"
_VOCABULARY = 49_152
_EOS = 2
_SIZES = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": _EOS,
}
_GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


def _save_tiny(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Weights of the usual tiny scale would make every sequence repeat one token, and tests that compare them blind.
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    model.save_pretrained(folder)
    copy(_REAL / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more threads, and threads that wait for each other lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    llama = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512}
    return {
        "real": _REAL,
        "tiny": _save_tiny(root / "tiny", transformers.LlamaConfig(**llama)),
        "short": _save_tiny(root / "short", transformers.LlamaConfig(**llama)),
        "window": _save_tiny(root / "window", transformers.MistralConfig(**llama, sliding_window=8)),
        "alibi": _save_tiny(root / "alibi", transformers.BloomConfig(**_SIZES)),
    }


def _spec(folders: dict[str, Path], names: Sequence[str], **options: Any) -> catalog.BackendSpec:
    limits = {"short": 64, "real": 2048}
    models = tuple(
        catalog.ModelSpec(
            name=name,
            path=str(folders[name]),
            tasks=("generate",),
            context_length=limits.get(name, 512),
            revision="1",
            entry=catalog.ModelEntry(path=name, backends=["gpt"]),
        )
        for name in names
    )
    entry = catalog.BackendEntry(
        runtime="gpt", options={"dtype": "float32", "device": "cpu", "num_threads": 1, **options}
    )
    return catalog.BackendSpec("gpt", "gpt", entry, models)


@contextlib.asynccontextmanager
async def _started(spec: catalog.BackendSpec) -> AsyncIterator[GPTBackend]:
    backend = GPTBackend(spec)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def backend(folders: dict[str, Path]) -> AsyncIterator[GPTBackend]:
    """All models in one backend; long prompts take several steps."""
    async with _started(_spec(folders, list(folders), max_batch_size=8, prefill_tokens=32)) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def fragile(folders: dict[str, Path]) -> AsyncIterator[GPTBackend]:
    """A backend of its own, for tests that break it."""
    async with _started(_spec(folders, ["tiny"], max_batch_size=4, prefill_tokens=32)) as made:
        yield made


@pytest.fixture(scope="module")
def reference(folders: dict[str, Path]) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            loaded[name] = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype="float32").eval()
        return loaded[name]

    return get


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(_REAL / "tokenizer.json"))


def _prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1000 + length)
    return torch.randint(20, 40_000, (length,), generator=generator).tolist()


def _call(model: str, prompt: list[int], params: SamplingParams, **more: Any) -> GenerateCall:
    return GenerateCall(f"{model}-{id(prompt)}", model, prompt, params, **more)


async def _chunks(backend: GPTBackend, call: GenerateCall) -> list[Chunk]:
    return [chunk async for chunk in backend.generate(call)]


async def _tokens(backend: GPTBackend, call: GenerateCall) -> list[int]:
    return [token for chunk in await _chunks(backend, call) for token in chunk.token_ids]


def _generate(model: Any, prompt: list[int], count: int) -> list[int]:
    """Transformers' own greedy answer, computed alone."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def _next_logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0, -1].float()  # type: ignore[no-any-return]


# Import and start


def test_import_loads_no_runtime() -> None:
    code = "import sys, backends.gpt_backend; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@in_module_loop
async def test_unknown_option_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(BackendError, match="max_batch"):
        await GPTBackend(_spec(folders, ["tiny"], max_batch=3)).start()


@in_module_loop
async def test_missing_weights_fail_the_start(tmp_path: Path) -> None:
    backend = GPTBackend(_spec({"tiny": tmp_path}, ["tiny"]))
    with pytest.raises((OSError, ValueError)):
        await backend.start()
    with pytest.raises(BackendDead):
        backend.check_health()


@in_module_loop
async def test_pickled_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["tiny"].glob("*.json"):
        copy(file, tmp_path)
    weights = transformers.AutoModelForCausalLM.from_pretrained(folders["tiny"]).state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        await GPTBackend(_spec({"tiny": tmp_path}, ["tiny"])).start()


def test_architectures_get_the_runner_they_can_use(folders: dict[str, Path]) -> None:
    assert isinstance(load(folders["window"], 2, 64, {}), RaggedRunner)
    assert isinstance(load(folders["alibi"], 2, 64, {}), SerialRunner)


def test_attention_that_differs_is_noticed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(folders["tiny"], 2, 64, {}).forward
    monkeypatch.setattr("backends.gpt_model._Step.single_mask", lambda *_: None)
    assert whole.__self__.__class__ is RaggedRunner  # type: ignore[attr-defined]
    assert isinstance(load(folders["tiny"], 2, 64, {}), SerialRunner)


@pytest.mark.parametrize("options", [{"pack_weights": True}, {"pack_weights": False}])
def test_packed_weights_change_nothing(
    folders: dict[str, Path], reference: Callable[[str], Any], options: dict[str, bool]
) -> None:
    prompt = _prompt(20)
    with torch.inference_mode():
        logits = load(folders["tiny"], 2, 64, options).forward([Piece(0, 0, prompt)])[0]
    torch.testing.assert_close(logits, _next_logits(reference("tiny"), prompt), rtol=1e-4, atol=1e-4)


# Greedy, whatever joins


@pytest.mark.parametrize("name", ["real", "tiny", "window", "alibi"])
@in_module_loop
async def test_greedy_alone_is_generate(backend: GPTBackend, reference: Callable[[str], Any], name: str) -> None:
    prompt = _prompt(20)
    expected = _generate(reference(name), prompt, 16)
    assert len(set(expected)) > 2
    assert await _tokens(backend, _call(name, prompt, _GREEDY)) == expected


@pytest.mark.parametrize("name", ["tiny", "window", "alibi"])
@in_module_loop
async def test_greedy_is_generate_whatever_joins_and_leaves(
    backend: GPTBackend, reference: Callable[[str], Any], name: str
) -> None:
    # More sequences than slots, prompts up to ten prefill steps, lengths that end in every order.
    lengths = [3, 320, 17, 64, 1, 33, 200, 5, 90, 2, 31, 32]
    counts = [40, 6, 25, 3, 30, 12, 8, 1, 20, 35, 2, 15]
    prompts = [_prompt(length) for length in lengths]

    async def join(index: int) -> list[int]:
        params = replace(_GREEDY, max_tokens=counts[index])
        return await _tokens(backend, _call(name, prompts[index], params, is_streaming=index % 2 == 0))

    first = backend.generate(_call(name, _prompt(7), replace(_GREEDY, max_tokens=60), is_streaming=True))
    tasks = []
    for index in range(len(prompts)):
        await anext(first)  # one more step has happened since the last one joined
        tasks.append(asyncio.create_task(join(index)))
    results = await asyncio.gather(*tasks)
    await first.aclose()  # type: ignore[attr-defined]
    for prompt, count, result in zip(prompts, counts, results, strict=True):
        assert result == _generate(reference(name), prompt, count)


@in_module_loop
async def test_real_model_staggered(backend: GPTBackend, reference: Callable[[str], Any], tokenizer: Tokenizer) -> None:
    texts = ["The capital of France is", "def add(a, b):", "Once upon a time, in a land far away, there lived a"]
    prompts = [tokenizer.encode(text).ids for text in texts]
    first = backend.generate(_call("real", prompts[0], replace(_GREEDY, max_tokens=12), is_streaming=True))
    head = [token for _ in range(3) for token in (await anext(first)).token_ids]
    others = [
        asyncio.create_task(_tokens(backend, _call("real", p, replace(_GREEDY, max_tokens=10)))) for p in prompts[1:]
    ]
    tail = [token async for chunk in first for token in chunk.token_ids]
    assert head + tail == _generate(reference("real"), prompts[0], 12)
    for prompt, task in zip(prompts[1:], others, strict=True):
        assert await task == _generate(reference("real"), prompt, 10)


# Streams


@in_module_loop
async def test_without_streaming_one_chunk(backend: GPTBackend, tokenizer: Tokenizer) -> None:
    (chunk,) = await _chunks(backend, _call("tiny", _prompt(5), _GREEDY))
    assert chunk.finish_reason == "length"
    assert len(chunk.token_ids) == 16
    assert chunk.text == tokenizer.decode(list(chunk.token_ids))


@in_module_loop
async def test_streaming_gives_tokens_as_they_come(backend: GPTBackend) -> None:
    whole = await _tokens(backend, _call("tiny", _prompt(5), _GREEDY))
    chunks = await _chunks(backend, _call("tiny", _prompt(5), _GREEDY, is_streaming=True))
    assert len(chunks) > 4
    assert [token for chunk in chunks for token in chunk.token_ids] == whole
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


@in_module_loop
async def test_text_is_whole_characters(backend: GPTBackend, tokenizer: Tokenizer) -> None:
    """Random tokens of a byte-level vocabulary: many are parts of characters, some of none."""
    seen_held_back = False
    for seed in range(6):
        params = SamplingParams(max_tokens=40, temperature=3.0, seed=seed, ignore_eos=True)
        chunks = await _chunks(backend, _call("tiny", _prompt(4), params, is_streaming=True))
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert "".join(chunk.text for chunk in chunks) == tokenizer.decode(tokens)
        assert not any(chunk.text.endswith("\ufffd") for chunk in chunks[:-1])
        seen_held_back |= any(not chunk.text for chunk in chunks[:-1])
    assert seen_held_back


def test_a_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    text = "naïve 🦜 日本語 👩‍👩‍👧"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([token]) for token in ids]
    assert "".join(pieces) == text
    assert "" in pieces
    assert detokenizer.finish() == ""
    parrot = tokenizer.encode("🦜", add_special_tokens=False).ids
    assert len(parrot) > 1
    cut = Detokenizer(tokenizer)
    assert cut.push(parrot[:-1]) == ""
    assert set(cut.finish()) == {"\ufffd"}


@in_module_loop
async def test_text_continues_inside_a_character(backend: GPTBackend, tokenizer: Tokenizer) -> None:
    parrot = tokenizer.encode("🦜", add_special_tokens=False).ids
    params = replace(_GREEDY, max_tokens=len(parrot), logit_bias={parrot[-1]: 1000.0})
    call = _call("tiny", _prompt(4), params, resumed_token_ids=tuple(parrot[:-1]))
    (chunk,) = await _chunks(backend, call)
    assert (chunk.text, chunk.token_ids, chunk.finish_reason) == ("🦜", (parrot[-1],), "length")


# Leaving


@pytest.mark.parametrize("how", ["close", "cancel"])
@in_module_loop
async def test_a_closed_or_cancelled_reader_leaves_the_batch(backend: GPTBackend, how: str) -> None:
    params = replace(_GREEDY, max_tokens=400)
    witness = backend.generate(_call("tiny", _prompt(6), params, is_streaming=True))
    await anext(witness)
    leaver = backend.generate(_call("tiny", _prompt(9), params, is_streaming=True))
    await anext(leaver)
    assert backend.running("tiny") == 2
    if how == "close":
        await leaver.aclose()  # type: ignore[attr-defined]
    else:
        is_reading = asyncio.Event()
        reading = asyncio.create_task(_drain(leaver, is_reading))
        await is_reading.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    await _until(witness, lambda: backend.running("tiny") == 1)
    await witness.aclose()  # type: ignore[attr-defined]


@in_module_loop
async def test_cancelled_while_waiting_never_joins(backend: GPTBackend) -> None:
    params = replace(_GREEDY, max_tokens=400)
    holders = [backend.generate(_call("tiny", _prompt(3, i), params, is_streaming=True)) for i in range(8)]
    for holder in holders:
        await anext(holder)
    waiting = asyncio.create_task(_tokens(backend, _call("tiny", _prompt(5), params)))
    await _until(holders[0], lambda: backend.running("tiny") == 8)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await holders[7].aclose()  # type: ignore[attr-defined]
    await _until(holders[0], lambda: backend.running("tiny") == 7)
    for holder in holders[:7]:
        await holder.aclose()  # type: ignore[attr-defined]


async def _drain(chunks: AsyncIterator[Chunk], is_reading: asyncio.Event | None = None) -> None:
    async for _ in chunks:
        if is_reading is not None:
            is_reading.set()


async def _until(witness: AsyncIterator[Chunk], holds: Callable[[], bool]) -> None:
    """Let steps of the batch pass until `holds`; a reader may be some steps behind, never many."""
    for _ in range(20):
        await anext(witness)
        if holds():
            return
    pytest.fail("not within 20 steps")


@in_module_loop
async def test_no_more_than_max_batch_size_run(backend: GPTBackend) -> None:
    most = 0

    async def watch(index: int) -> int:
        nonlocal most
        count = 0
        async for chunk in backend.generate(_call("tiny", _prompt(3, index), _GREEDY, is_streaming=True)):
            most = max(most, backend.running("tiny"))
            count += len(chunk.token_ids)
        return count

    assert await asyncio.gather(*(watch(index) for index in range(20))) == [16] * 20
    assert 1 < most <= 8


# Sampling


@in_module_loop
async def test_each_call_keeps_its_own_parameters(backend: GPTBackend) -> None:
    prompt = _prompt(10)
    variants = [
        _GREEDY,
        replace(_GREEDY, temperature=0.7, seed=1),
        replace(_GREEDY, temperature=1.5, seed=2, top_p=0.8),
        replace(_GREEDY, temperature=1.0, seed=3, top_k=5, min_p=0.05),
        replace(_GREEDY, repetition_penalty=1.5, logprobs=2),
        replace(_GREEDY, logit_bias={777: 1000.0}, max_tokens=4),
        replace(_GREEDY, temperature=1.0, top_k=1),
    ]
    alone = [await _tokens(backend, _call("tiny", prompt, params)) for params in variants]
    together = await asyncio.gather(*(_tokens(backend, _call("tiny", prompt, params)) for params in variants))
    assert together == alone
    assert alone[5] == [777] * 4
    assert alone[6] == alone[0]
    assert len({tuple(tokens) for tokens in alone[:5]}) == 5


@in_module_loop
async def test_unseeded_calls_differ_and_seeded_ones_do_not(backend: GPTBackend) -> None:
    hot = SamplingParams(max_tokens=8, temperature=2.0, ignore_eos=True)
    free = await asyncio.gather(*(_tokens(backend, _call("tiny", _prompt(5), hot)) for _ in range(4)))
    assert len({tuple(tokens) for tokens in free}) == 4
    seeds = [7, 7, 8, 7]
    tied = await asyncio.gather(
        *(_tokens(backend, _call("tiny", _prompt(5), replace(hot, seed=seed))) for seed in seeds)
    )
    assert tied[0] == tied[1] == tied[3] != tied[2]


@in_module_loop
async def test_resuming_continues_the_same_sequence(backend: GPTBackend) -> None:
    params = SamplingParams(
        max_tokens=14,
        temperature=1.2,
        seed=11,
        top_p=0.9,
        ignore_eos=True,
        frequency_penalty=0.8,
        presence_penalty=0.3,
        repetition_penalty=1.2,
        min_tokens=9,
    )
    whole = await _tokens(backend, _call("tiny", _prompt(12), params))
    assert len(whole) == 14
    tails = await asyncio.gather(
        *(
            _tokens(backend, _call("tiny", _prompt(12), params, resumed_token_ids=tuple(whole[:done])))
            for done in range(14)
        )
    )
    assert tails == [whole[done:] for done in range(14)]


@in_module_loop
async def test_resuming_what_was_finished_gives_only_the_reason(backend: GPTBackend) -> None:
    params = SamplingParams(max_tokens=3, temperature=0)
    for resumed, reason in (((5, 6, 7), "length"), ((5, _EOS), "stop")):
        (chunk,) = await _chunks(backend, _call("tiny", _prompt(4), params, resumed_token_ids=resumed))
        assert (chunk.token_ids, chunk.text, chunk.finish_reason) == ((), "", reason)


@pytest.mark.parametrize(
    "params",
    [
        replace(_GREEDY, repetition_penalty=1.8),
        replace(_GREEDY, repetition_penalty=0.6),
        replace(_GREEDY, frequency_penalty=1.5),
        replace(_GREEDY, presence_penalty=2.0),
        replace(_GREEDY, frequency_penalty=-0.5, presence_penalty=0.7, repetition_penalty=1.3),
        replace(_GREEDY, logit_bias={100: 2.5, 200: -3.0, 300: 2.6}),
    ],
)
@in_module_loop
async def test_penalties_and_bias_follow_their_definition(
    backend: GPTBackend, reference: Callable[[str], Any], params: SamplingParams
) -> None:
    prompt = _prompt(30)
    tokens = await _tokens(backend, _call("tiny", prompt, params))
    generated: list[int] = []
    for _ in range(params.max_tokens):
        logits = _next_logits(reference("tiny"), prompt + generated)
        for token, bias in params.logit_bias.items():
            logits[token] += bias
        for token in {*prompt, *generated}:
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token, count in Counter(generated).items():
            logits[token] -= params.frequency_penalty * count + params.presence_penalty
        generated.append(int(logits.argmax()))
    assert tokens == generated


@in_module_loop
async def test_penalties_and_bias_have_an_effect(backend: GPTBackend) -> None:
    plain = await _tokens(backend, _call("tiny", _prompt(30), _GREEDY))
    forbidden = await _tokens(backend, _call("tiny", _prompt(30), replace(_GREEDY, logit_bias={plain[0]: -100.0})))
    penalised = await _tokens(backend, _call("tiny", _prompt(30), replace(_GREEDY, presence_penalty=100.0)))
    assert plain[0] not in forbidden
    assert len(set(penalised)) == len(penalised)


@pytest.mark.parametrize("wanted", [0, 1, 20])
@in_module_loop
async def test_logprobs_are_those_of_the_raw_logits(
    backend: GPTBackend, reference: Callable[[str], Any], wanted: int
) -> None:
    params = SamplingParams(
        max_tokens=5, temperature=1.7, seed=3, top_k=50, logprobs=wanted, presence_penalty=1.0, ignore_eos=True
    )
    prompt = _prompt(10)
    (chunk,) = await _chunks(backend, _call("tiny", prompt, params))
    assert len(chunk.logprobs) == 5
    ids = list(prompt)
    for entry, token in zip(chunk.logprobs, chunk.token_ids, strict=True):
        expected = torch.log_softmax(_next_logits(reference("tiny"), ids), -1)
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-3)
        best = expected.topk(wanted)
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert [place for place, _ in entry.top] == best.indices.tolist()
        ids.append(token)


def _samplers(params: SamplingParams, count: int) -> list[Sampler]:
    return [Sampler(params, seed, (), [], ()) for seed in range(count)]


def _drawn(logits: torch.Tensor, params: SamplingParams, count: int = 600) -> Counter[int]:
    return Counter(sample(logits.repeat(count, 1), _samplers(params, count))[0])


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = _drawn(probs.log(), SamplingParams(max_tokens=1), 4000)
    for token, share in enumerate(probs.tolist()):
        assert counts[token] == pytest.approx(4000 * share, abs=5 * math.sqrt(4000 * share * (1 - share)))


def test_temperature_sharpens() -> None:
    logits = torch.tensor([0.0, 1.0])
    cold = _drawn(logits, SamplingParams(max_tokens=1, temperature=0.25), 4000)[1] / 4000
    assert cold == pytest.approx(1 / (1 + math.exp(-4)), abs=0.02)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(max_tokens=1, top_k=2), {0, 1}),
        (SamplingParams(max_tokens=1, top_p=0.75), {0, 1}),
        (SamplingParams(max_tokens=1, top_p=0.85), {0, 1, 2}),
        (SamplingParams(max_tokens=1, min_p=0.2), {0, 1, 2}),
        (SamplingParams(max_tokens=1, min_p=0.4), {0, 1}),
        (SamplingParams(max_tokens=1, top_k=3, top_p=0.8), {0, 1}),  # of the three that top_k leaves
        (SamplingParams(max_tokens=1, top_p=0.0), {0}),
        (SamplingParams(max_tokens=1, top_k=100), {0, 1, 2, 3}),
    ],
)
def test_truncation_keeps_exactly(params: SamplingParams, kept: set[int]) -> None:
    probs = torch.tensor([0.45, 0.33, 0.14, 0.08])
    assert set(_drawn(probs.log(), params)) == kept


def test_top_p_reaches_past_its_shortlist() -> None:
    """A flat distribution: half of the mass is far more tokens than are sorted at first."""
    logits = torch.linspace(0.001, 0.0, 2000)
    shares = torch.softmax(logits, -1)
    size = int((shares.cumsum(-1) - shares < 0.5).sum())
    drawn = _drawn(logits, SamplingParams(max_tokens=1, top_p=0.5), 3000)
    assert 900 < max(drawn) < size
    assert 256 < max(_drawn(logits, SamplingParams(max_tokens=1, top_k=300), 3000)) < 300
    mixed = [
        *_samplers(SamplingParams(max_tokens=1, top_p=0.5), 50),
        *_samplers(SamplingParams(max_tokens=1, top_k=2), 50),
    ]
    tokens = sample(logits.repeat(100, 1), mixed)[0]
    assert tokens[:50] == sample(logits.repeat(50, 1), mixed[:50])[0]
    assert set(tokens[50:]) == {0, 1}


def test_the_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(max_tokens=9)
    resumed = Sampler(params, 5, (), [], [1, 2, 3])
    grown = Sampler(params, 5, (), [9], [])
    for token in (7, 8, 9):
        grown.accept(token)
    assert sample(logits.clone(), [resumed]) == sample(logits.clone(), [grown])
    positions = set()
    for token in range(20):
        positions.add(sample(logits.clone(), [grown])[0][0])
        grown.accept(token)
    assert len(positions) > 5


# Ends


@in_module_loop
async def test_eos_counts_as_a_token_and_is_no_text(backend: GPTBackend, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=9, temperature=0, logit_bias={_EOS: 1000.0}, min_tokens=4)
    (chunk,) = await _chunks(backend, _call("tiny", _prompt(5), params))
    assert chunk.finish_reason == "stop"
    assert chunk.token_ids[-1] == _EOS
    assert len(chunk.token_ids) == 5
    assert _EOS not in chunk.token_ids[:4]
    assert chunk.text == tokenizer.decode(list(chunk.token_ids[:4]))


@in_module_loop
async def test_ignore_eos_goes_on(backend: GPTBackend) -> None:
    params = SamplingParams(max_tokens=6, temperature=0, logit_bias={_EOS: 1000.0}, ignore_eos=True)
    (chunk,) = await _chunks(backend, _call("tiny", _prompt(5), params))
    assert (chunk.token_ids, chunk.finish_reason) == ((_EOS,) * 6, "length")


@in_module_loop
async def test_stop_token_ids_end_and_are_no_text(backend: GPTBackend, tokenizer: Tokenizer) -> None:
    plain = await _tokens(backend, _call("tiny", _prompt(5), _GREEDY))
    stop = next(token for index, token in enumerate(plain) if index >= 3 and token not in plain[:index])
    at = plain.index(stop)
    (chunk,) = await _chunks(backend, _call("tiny", _prompt(5), replace(_GREEDY, stop_token_ids=(stop,))))
    assert (list(chunk.token_ids), chunk.finish_reason) == (plain[: at + 1], "stop")
    assert chunk.text == tokenizer.decode(plain[:at])
    late = replace(_GREEDY, stop_token_ids=(stop,), min_tokens=at + 2)
    assert stop not in (await _tokens(backend, _call("tiny", _prompt(5), late)))[: at + 2]


@pytest.mark.parametrize(("length", "count"), [(60, 4), (63, 1), (64, 0), (1, 63)])
@in_module_loop
async def test_the_context_ends_with_length(backend: GPTBackend, length: int, count: int) -> None:
    params = replace(_GREEDY, max_tokens=1000)
    (chunk,) = await _chunks(backend, _call("short", _prompt(length), params))
    assert (len(chunk.token_ids), chunk.finish_reason) == (count, "length")


@in_module_loop
async def test_a_sequence_may_grow_past_the_first_cache(backend: GPTBackend, reference: Callable[[str], Any]) -> None:
    """Cached values survive growing, beside a sequence that joined before it."""
    prompt = _prompt(250)
    other = asyncio.create_task(_tokens(backend, _call("tiny", _prompt(8), replace(_GREEDY, max_tokens=60))))
    tokens = await _tokens(backend, _call("tiny", prompt, replace(_GREEDY, max_tokens=40)))
    assert tokens == _generate(reference("tiny"), prompt, 40)
    assert await other == _generate(reference("tiny"), _prompt(8), 60)


@pytest.mark.parametrize(
    ("model", "prompt", "params"),
    [
        ("nobody", [5], _GREEDY),
        ("tiny", [], _GREEDY),
        ("tiny", [_VOCABULARY], _GREEDY),
        ("tiny", [-1], _GREEDY),
        ("short", [5] * 65, _GREEDY),
        ("tiny", [5], replace(_GREEDY, logprobs=21)),
        ("tiny", [5], replace(_GREEDY, logit_bias={_VOCABULARY: 1.0})),
        ("tiny", [5], replace(_GREEDY, temperature=-1.0)),
        ("tiny", [5], replace(_GREEDY, repetition_penalty=0.0)),
    ],
)
@in_module_loop
async def test_impossible_calls_are_refused(
    backend: GPTBackend, model: str, prompt: list[int], params: SamplingParams
) -> None:
    with pytest.raises(InvalidCall):
        await _chunks(backend, _call(model, prompt, params))


# Failures


class _Faulty:
    """A runner that fails for sequences which hold the token `_MARK`."""

    def __init__(self, runner: Any, fault: Callable[[Sequence[Piece], Any], torch.Tensor]) -> None:
        self._runner = runner
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        return self._fault(pieces, self._runner)


_MARK = 12_345


def _break(backend: GPTBackend, fault: Callable[[Sequence[Piece], Any], torch.Tensor]) -> None:
    batch = backend._models["tiny"].batch
    batch._runner = _Faulty(batch._runner, fault)


def _no_memory(pieces: Sequence[Piece], runner: Any) -> torch.Tensor:
    if any(_MARK in piece.tokens for piece in pieces):
        raise torch.OutOfMemoryError("no room")
    return runner.forward(pieces)  # type: ignore[no-any-return]


def _not_a_number(pieces: Sequence[Piece], runner: Any) -> torch.Tensor:
    logits = runner.forward(pieces)
    for row, piece in enumerate(pieces):
        if _MARK in piece.tokens:
            logits[row, 3] = float("nan")
    return logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("fault", [_no_memory, _not_a_number])
@in_module_loop
async def test_a_prompt_that_fails_fails_alone(
    fragile: GPTBackend, reference: Callable[[str], Any], fault: Callable[[Sequence[Piece], Any], torch.Tensor]
) -> None:
    _break(fragile, fault)
    running = fragile.generate(_call("tiny", _prompt(6), replace(_GREEDY, max_tokens=30), is_streaming=True))
    head = list((await anext(running)).token_ids)
    bad = asyncio.create_task(_tokens(fragile, _call("tiny", [5, _MARK, 6], _GREEDY)))
    good = asyncio.create_task(_tokens(fragile, _call("tiny", _prompt(9), _GREEDY)))
    with pytest.raises(BackendError) as caught:
        await bad
    assert not isinstance(caught.value, BackendDead | InvalidCall)
    assert await good == _generate(reference("tiny"), _prompt(9), 16)
    tail = [token async for chunk in running for token in chunk.token_ids]
    assert head + tail == _generate(reference("tiny"), _prompt(6), 30)
    fragile.check_health()


@in_module_loop
async def test_values_that_are_not_numbers_do_not_outlive_their_sequence(
    fragile: GPTBackend, reference: Callable[[str], Any]
) -> None:
    layers = fragile._models["tiny"].batch._runner._cache.layers  # type: ignore[attr-defined]

    def poison(pieces: Sequence[Piece], runner: Any) -> torch.Tensor:
        logits = runner.forward(pieces)
        for row, piece in enumerate(pieces):
            if _MARK in piece.tokens:
                for keys, values in layers.values():
                    keys[piece.slot, :, : piece.end] = float("nan")
                    values[piece.slot, :, : piece.end] = float("nan")
                logits[row] = float("nan")
        return logits  # type: ignore[no-any-return]

    _break(fragile, poison)
    with pytest.raises(BackendError, match="not numbers"):
        await _tokens(fragile, _call("tiny", [*_prompt(20), _MARK], _GREEDY))
    calls = [_call("tiny", _prompt(length), _GREEDY) for length in (2, 12)]
    for call, tokens in zip(calls, await asyncio.gather(*(_tokens(fragile, call) for call in calls)), strict=True):
        assert tokens == _generate(reference("tiny"), call.prompt_token_ids, 16)


@in_module_loop
async def test_a_runtime_that_keeps_failing_is_dead(fragile: GPTBackend) -> None:
    def fail(pieces: Sequence[Piece], runner: Any) -> torch.Tensor:
        raise RuntimeError("broken")

    _break(fragile, fail)
    for _ in range(3):
        with pytest.raises(BackendError):
            await asyncio.wait_for(_tokens(fragile, _call("tiny", _prompt(4), _GREEDY)), 30)
    with pytest.raises(BackendDead):
        fragile.check_health()
    with pytest.raises(BackendDead):
        await asyncio.wait_for(_tokens(fragile, _call("tiny", _prompt(4), _GREEDY)), 30)


@in_module_loop
async def test_the_end_of_the_loop_fails_every_call(fragile: GPTBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    running = fragile.generate(_call("tiny", _prompt(6), replace(_GREEDY, max_tokens=400), is_streaming=True))
    await anext(running)

    def broken_plan() -> list[Piece]:
        raise AssertionError("a defect in the loop")

    monkeypatch.setattr(fragile._models["tiny"].batch, "_plan", broken_plan)
    waiting = asyncio.create_task(_tokens(fragile, _call("tiny", _prompt(4), _GREEDY)))
    with pytest.raises(BackendDead):
        await asyncio.wait_for(_drain(running), 30)
    with pytest.raises(BackendDead):
        await asyncio.wait_for(waiting, 30)
    with pytest.raises(BackendDead):
        fragile.check_health()


@in_module_loop
async def test_stopping_ends_what_runs(folders: dict[str, Path]) -> None:
    backend = GPTBackend(_spec(folders, ["tiny"]))
    await backend.start()
    running = backend.generate(_call("tiny", _prompt(6), replace(_GREEDY, max_tokens=500), is_streaming=True))
    await anext(running)
    await backend.stop()
    with pytest.raises(BackendError):
        await asyncio.wait_for(_drain(running), 30)
    with pytest.raises(BackendError) as late:
        await _tokens(backend, _call("tiny", _prompt(4), _GREEDY))
    assert not isinstance(late.value, InvalidCall | BackendDead)
