"""The encoder backend against Transformers and sentence-transformers, and the promises of its batching.

Batching is tested with a gate in front of the forward pass: while it is shut, calls queue up, so what the next
pass takes does not depend on timing.
"""

import asyncio
import json
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
import transformers
import yaml
from sentence_transformers import SentenceTransformer

import catalog
import settings
from backends import bert_model
from backends.base import BackendDead, BackendError, EncodeCall, InvalidCall
from backends.bert_backend import BERTBackend
from local import banking77

pytestmark = pytest.mark.models
in_module_loop = pytest.mark.asyncio(loop_scope="module")

_ENCODER = settings.load().models_dir.absolute() / "all-minilm-l6-v2"
_POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_TINY = {
    "vocab_size": 30_522,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 600,
}


def _save_tiny(folder: Path, model: Any) -> Path:
    # Weights of the usual tiny scale would make all outputs alike, and tests that compare them blind.
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=_save_tiny.generator) * 0.3  # type: ignore[attr-defined]
    model.save_pretrained(folder)
    return folder


_save_tiny.generator = torch.Generator().manual_seed(0)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The real models, and tiny random ones for what the real ones do not have."""
    root = tmp_path_factory.mktemp("models")
    bert = transformers.BertConfig(**_TINY)
    built = {
        "minilm": _ENCODER,
        "banking77": root / "banking77",
        "cross": _save_tiny(
            root / "cross",
            transformers.BertForSequenceClassification(transformers.BertConfig(**_TINY, num_labels=1)),
        ),
        "multi": _save_tiny(
            root / "multi",
            transformers.BertForSequenceClassification(
                transformers.BertConfig(**_TINY, num_labels=5, problem_type="multi_label_classification")
            ),
        ),
        "roberta": _save_tiny(root / "roberta", transformers.RobertaModel(transformers.RobertaConfig(**_TINY))),
        "roberta-head": _save_tiny(
            root / "roberta-head",
            transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**_TINY, num_labels=3)),
        ),
        "mpnet": _save_tiny(root / "mpnet", transformers.MPNetModel(transformers.MPNetConfig(**_TINY))),
    }
    banking77.build(_ENCODER, built["banking77"])
    for mode in _POOLINGS:
        built[mode] = _save_tiny(root / mode, transformers.BertModel(bert))
        _write_sentence_modules(built[mode], [mode])
    built["cls+max"] = _save_tiny(root / "cls+max", transformers.BertModel(bert))
    _write_sentence_modules(built["cls+max"], ["cls", "max"])
    return built


def _write_sentence_modules(folder: Path, modes: list[str]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (folder / name).write_bytes((_ENCODER / name).read_bytes())
    (folder / "1_Pooling").mkdir()
    pooling = {"embedding_dimension": _TINY["hidden_size"], "pooling_mode": modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for index, (path, kind) in enumerate(modules)
            ]
        )
    )


def _backend(models: dict[str, Path], file: Path, **options: Any) -> BERTBackend:
    config = {
        "backends": {"bert": {"runtime": "bert", "options": {"num_threads": 1, **options}}},
        "models": {name: {"path": str(path), "backends": ["bert"]} for name, path in models.items()},
    }
    file.write_text(yaml.safe_dump(config))
    return BERTBackend(catalog.load(file, file.parent).backends["bert"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[BERTBackend]:
    """Every model in one instance."""
    started = _backend(folders, tmp_path_factory.mktemp("config") / "switchyard.yaml")
    await started.start()
    yield started
    await started.stop()


@asynccontextmanager
async def _small_backend(folders: dict[str, Path], tmp_path: Path, **options: Any) -> AsyncIterator[BERTBackend]:
    """An instance of its own, for tests that need other options or break it."""
    started = _backend({"tiny": folders["mean"]}, tmp_path / "switchyard.yaml", **options)
    await started.start()
    try:
        yield started
    finally:
        await started.stop()


class _Gate:
    """Holds forward passes back while shut, and records what each consisted of."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        """Lengths of the sequences of each pass."""
        self.failing: set[int] = set()
        """Passes whose batch holds a sequence of such a length fail."""
        self.error: BaseException = RuntimeError("broken on purpose")
        self._open = threading.Event()
        self._arrived = threading.Event()

    def open(self) -> None:
        self._open.set()

    async def wait_until_held(self) -> None:
        """Until a pass stands at the gate: calls made from now on go to later passes."""
        assert await asyncio.to_thread(self._arrived.wait, 20)

    def wrap(self, run: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def gated(model: Any, batch: Any) -> np.ndarray:
            self._arrived.set()
            assert self._open.wait(20)
            self.batches.append([item.length for item in batch])
            if self.failing.intersection(self.batches[-1]):
                raise self.error
            return run(model, batch)

        return gated


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Gate]:
    """Shut at first. Ask for it after the backend has started, or open it before."""
    shut = _Gate()
    yield shut
    shut.open()


@pytest.fixture
def install(gate: _Gate, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(bert_model.BERTModel, "run", gate.wrap(bert_model.BERTModel.run))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(_ENCODER)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """240 texts from nothing at all to beyond the context, with scripts, symbols and repetition among them."""
    rng = random.Random(7)
    words = [
        "the",
        "a",
        "card",
        "bank",
        "river",
        "ledger",
        "is",
        "was",
        "payment",
        "of",
        "quickly",
        "sat",
        "upon",
        "green",
        "idea",
        "42",
        "hyphen-ated",
        "naïve",
    ]
    odd = ["", "?", "日本語のテキスト", "🙂🙃", "Ünïcödé", "x" * 400, "مرحبا بالعالم", "A\nB\tC", "no " * 300]
    return odd + [" ".join(rng.choices(words, k=int(rng.paretovariate(0.9)) % 250 + 1)) for _ in range(231)]


def _call(model: str, inputs: list[list[int]], **rest: Any) -> EncodeCall:
    return EncodeCall("call", model, inputs, **rest)


def _ids(*lengths: int) -> list[list[int]]:
    return [[101, *((1000 + 37 * length + step) % 30_000 for step in range(length - 2)), 102] for length in lengths]


def test_importing_the_module_leaves_the_runtime_out() -> None:
    code = "import sys, backends.bert_backend; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@in_module_loop
async def test_embeddings_are_those_of_sentence_transformers(
    backend: BERTBackend, tokenizer: Any, texts: list[str]
) -> None:
    expected = SentenceTransformer(str(_ENCODER), device="cpu").encode(texts, batch_size=32)
    ids = tokenizer(texts, truncation=True, max_length=256)["input_ids"]
    rows = await backend.embed(_call("minilm", ids))
    assert rows.dtype == np.float32
    assert rows.shape == (240, 384)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert (rows * expected).sum(axis=1).min() >= 0.9999


@in_module_loop
@pytest.mark.parametrize("model", [*_POOLINGS, "cls+max"])
async def test_pooling_follows_the_folder(
    model: str, backend: BERTBackend, folders: dict[str, Path], tokenizer: Any
) -> None:
    texts = ["one", "a longer text than that", "and three"]
    reference = SentenceTransformer(str(folders[model]), device="cpu")
    rows = await backend.embed(_call(model, tokenizer(texts)["input_ids"]))
    np.testing.assert_allclose(rows, reference.encode(texts), rtol=1e-3, atol=1e-4)


@in_module_loop
@pytest.mark.parametrize(("model", "is_packed"), [("minilm", True), ("roberta", True), ("mpnet", False)])
async def test_architectures_agree_with_transformers_packed_or_not(
    model: str, is_packed: bool, backend: BERTBackend, folders: dict[str, Path]
) -> None:
    inputs = _ids(3, 40, 7, 40, 200)
    reference = transformers.AutoModel.from_pretrained(folders[model]).eval()
    with torch.inference_mode():
        states = [reference(torch.tensor([ids])).last_hidden_state.mean(dim=1)[0] for ids in inputs]
    expected = torch.stack(states)
    if model == "minilm":
        expected = torch.nn.functional.normalize(expected, dim=-1)
    assert backend._models[model].is_packed is is_packed
    rows = await backend.embed(_call(model, inputs))
    np.testing.assert_allclose(rows, expected.numpy(), rtol=1e-3, atol=1e-4)


@in_module_loop
async def test_a_result_does_not_depend_on_its_batch(backend: BERTBackend) -> None:
    inputs = _ids(5, 5, 9, 30, 31, 64, 128, 200)
    merged = await backend.embed(_call("minilm", inputs))
    alone = [(await backend.embed(_call("minilm", [ids])))[0] for ids in inputs]
    np.testing.assert_allclose(merged, np.stack(alone), rtol=1e-4, atol=1e-5)
    assert np.abs(merged[0] - merged[2]).max() > 1e-2


@in_module_loop
async def test_rows_come_back_in_the_order_of_the_inputs(backend: BERTBackend) -> None:
    inputs = _ids(30, 5, 64, 9, 5)
    forwards = await backend.embed(_call("minilm", inputs))
    backwards = await backend.embed(_call("minilm", inputs[::-1]))
    np.testing.assert_allclose(forwards, backwards[::-1], rtol=1e-4, atol=1e-5)


@in_module_loop
async def test_waiting_calls_share_one_forward_pass(
    backend: BERTBackend, gate: _Gate, install: Callable[[], None]
) -> None:
    install()
    passes = backend.num_forward_passes
    first = asyncio.create_task(backend.embed(_call("mean", _ids(6))))
    await gate.wait_until_held()
    others = [asyncio.create_task(backend.embed(_call("mean", _ids(5 + number)))) for number in range(20)]
    await asyncio.sleep(0)
    gate.open()
    rows = await asyncio.gather(first, *others)
    assert gate.batches == [[6], list(range(5, 25))]
    assert backend.num_forward_passes - passes == 2
    np.testing.assert_allclose(rows[0], rows[2], rtol=1e-4, atol=1e-5)


@in_module_loop
async def test_models_do_not_share_a_forward_pass(
    backend: BERTBackend, gate: _Gate, install: Callable[[], None]
) -> None:
    install()
    first = asyncio.create_task(backend.embed(_call("mean", _ids(6))))
    await gate.wait_until_held()
    others = [
        asyncio.create_task(backend.embed(_call(model, _ids(length))))
        for model, length in (("mean", 7), ("max", 8), ("mean", 9))
    ]
    await asyncio.sleep(0)
    gate.open()
    await asyncio.gather(first, *others)
    assert gate.batches == [[6], [7, 9], [8]]


@in_module_loop
async def test_a_batch_keeps_to_the_token_budget(
    folders: dict[str, Path], tmp_path: Path, gate: _Gate, install: Callable[[], None]
) -> None:
    async with _small_backend(folders, tmp_path, max_batch_tokens=64) as backend:
        install()
        gate.open()
        await backend.embed(_call("tiny", _ids(*range(3, 30), 100)))
    assert sorted(length for batch in gate.batches for length in batch) == [*range(3, 30), 100]
    assert all(sum(batch) <= 64 or batch == [100] for batch in gate.batches)
    assert len(gate.batches) <= 9
    assert all(batch == sorted(batch) for batch in gate.batches)


@in_module_loop
async def test_padding_counts_against_the_budget_of_a_padded_model(
    folders: dict[str, Path], tmp_path: Path, gate: _Gate, install: Callable[[], None]
) -> None:
    padded = _backend({"mpnet": folders["mpnet"]}, tmp_path / "switchyard.yaml", max_batch_tokens=64)
    await padded.start()
    install()
    gate.open()
    await padded.embed(_call("mpnet", _ids(4, 4, 4, 4, 30, 30)))
    await padded.stop()
    assert all(max(batch) * len(batch) <= 64 for batch in gate.batches)


@in_module_loop
async def test_a_large_call_does_not_hold_up_a_small_one(
    folders: dict[str, Path], tmp_path: Path, gate: _Gate, install: Callable[[], None]
) -> None:
    async with _small_backend(folders, tmp_path, max_batch_tokens=64) as backend:
        install()
        large = asyncio.create_task(backend.embed(_call("tiny", _ids(*[8] * 400))))
        await gate.wait_until_held()
        small = asyncio.create_task(backend.embed(_call("tiny", _ids(5))))
        await asyncio.sleep(0)
        gate.open()
        await small
        assert not large.done()
        assert len(await large) == 400
    assert gate.batches[0] == [8] * 8
    assert gate.batches[1] == [5, *[8] * 7]
    assert sum(map(len, gate.batches)) == 401


@in_module_loop
async def test_many_large_calls_do_not_hold_up_a_small_one(
    folders: dict[str, Path], tmp_path: Path, gate: _Gate, install: Callable[[], None]
) -> None:
    async with _small_backend(folders, tmp_path, max_batch_tokens=64) as backend:
        install()
        large = [asyncio.create_task(backend.embed(_call("tiny", _ids(*[8] * 40)))) for _ in range(12)]
        await gate.wait_until_held()
        small = asyncio.create_task(backend.embed(_call("tiny", _ids(5))))
        await asyncio.sleep(0)
        gate.open()
        await asyncio.gather(small, *large)
    # Eight of the twelve fill the second pass; the third begins with the other four.
    assert [5 in batch for batch in gate.batches[:4]] == [False, False, True, False]


@in_module_loop
async def test_a_steady_flow_of_small_calls_does_not_hold_up_a_large_one(
    folders: dict[str, Path], tmp_path: Path, gate: _Gate, install: Callable[[], None]
) -> None:
    async with _small_backend(folders, tmp_path, max_batch_tokens=64) as backend:
        install()
        large = asyncio.create_task(backend.embed(_call("tiny", _ids(*[8] * 16))))

        async def keep_asking() -> None:
            while not large.done():
                await backend.embed(_call("tiny", _ids(5)))

        gate.open()
        await asyncio.gather(large, *(keep_asking() for _ in range(40)))
    # 40 small calls fill four passes; the large one adds a sequence in each turn of the line.
    assert len(gate.batches) <= 16 * 5


@in_module_loop
async def test_a_cancelled_call_leaves_the_line(
    folders: dict[str, Path], tmp_path: Path, gate: _Gate, install: Callable[[], None]
) -> None:
    async with _small_backend(folders, tmp_path) as backend:
        install()
        first = asyncio.create_task(backend.embed(_call("tiny", _ids(6))))
        await gate.wait_until_held()
        cancelled = asyncio.create_task(backend.embed(_call("tiny", _ids(17))))
        kept = asyncio.create_task(backend.embed(_call("tiny", _ids(9))))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        gate.open()
        await asyncio.gather(first, kept)
    assert cancelled.cancelled()
    assert gate.batches == [[6], [9]]


@in_module_loop
async def test_cancelling_a_call_in_a_running_pass_frees_its_rest(
    folders: dict[str, Path], tmp_path: Path, gate: _Gate, install: Callable[[], None]
) -> None:
    async with _small_backend(folders, tmp_path, max_batch_tokens=64) as backend:
        install()
        cancelled = asyncio.create_task(backend.embed(_call("tiny", _ids(*[8] * 400))))
        await gate.wait_until_held()
        cancelled.cancel()
        await asyncio.wait([cancelled])
        gate.open()
        await backend.embed(_call("tiny", _ids(5)))
    assert gate.batches == [[8] * 8, [5]]


@in_module_loop
async def test_an_error_fails_the_calls_of_its_batch_only(
    folders: dict[str, Path], tmp_path: Path, gate: _Gate, install: Callable[[], None]
) -> None:
    async with _small_backend(folders, tmp_path) as backend:
        install()
        gate.failing = {7}
        good = asyncio.create_task(backend.embed(_call("tiny", _ids(6))))
        await gate.wait_until_held()
        bad = [asyncio.create_task(backend.embed(_call("tiny", _ids(length)))) for length in (7, 8)]
        await asyncio.sleep(0)
        gate.open()
        assert (await good).shape == (1, 32)
        outcomes = await asyncio.gather(*bad, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [BackendError, BackendError]
        assert "broken on purpose" in str(outcomes[0])
        backend.check_health()
        assert (await backend.embed(_call("tiny", _ids(8)))).shape == (1, 32)


@in_module_loop
async def test_an_error_in_one_batch_of_a_large_call_ends_the_call(
    folders: dict[str, Path], tmp_path: Path, gate: _Gate, install: Callable[[], None]
) -> None:
    async with _small_backend(folders, tmp_path, max_batch_tokens=64) as backend:
        install()
        gate.open()
        gate.failing = {9}
        with pytest.raises(BackendError):
            await backend.embed(_call("tiny", _ids(*[8] * 400, 9)))
        assert (await backend.embed(_call("tiny", _ids(8)))).shape == (1, 32)
    assert gate.batches[1:] == [[8]]


@in_module_loop
@pytest.mark.parametrize("error", [SystemExit("out"), torch.AcceleratorError("the context is lost")])
async def test_a_dead_thread_is_reported_and_nobody_hangs(
    error: BaseException, folders: dict[str, Path], tmp_path: Path, gate: _Gate, install: Callable[[], None]
) -> None:
    async with _small_backend(folders, tmp_path) as backend:
        backend.check_health()
        install()
        gate.failing, gate.error = {7}, error
        calls = [asyncio.create_task(backend.embed(_call("tiny", _ids(7))))]
        await gate.wait_until_held()
        calls.append(asyncio.create_task(backend.embed(_call("tiny", _ids(9)))))
        await asyncio.sleep(0)
        gate.open()
        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
        assert all(isinstance(outcome, BackendError) for outcome in outcomes)
        with pytest.raises(BackendDead, match=str(error)):
            backend.check_health()
        with pytest.raises(BackendDead):
            await backend.embed(_call("tiny", _ids(5)))


@in_module_loop
async def test_stopping_leaves_no_call_waiting(
    folders: dict[str, Path], tmp_path: Path, gate: _Gate, install: Callable[[], None]
) -> None:
    async with _small_backend(folders, tmp_path) as backend:
        install()
        running = asyncio.create_task(backend.embed(_call("tiny", _ids(7))))
        await gate.wait_until_held()
        waiting = asyncio.create_task(backend.embed(_call("tiny", _ids(9))))
        await asyncio.sleep(0)
        gate.open()
        await backend.stop()
        outcomes = await asyncio.wait_for(asyncio.gather(running, waiting, return_exceptions=True), 10)
    assert isinstance(outcomes[1], BackendError)
    assert gate.batches == [[7]]


@in_module_loop
async def test_banking77_names_the_intent(backend: BERTBackend, tokenizer: Any) -> None:
    expected = {
        "My card still has not turned up in the mail.": "card_arrival",
        "Somebody stole my wallet, please block my card!": "lost_or_stolen_card",
        "I can't remember the PIN for my card": "change_pin",
        "How is the exchange rate worked out?": "exchange_rate",
        "I would like to close my account for good": "terminate_account",
        "Does the app support Apple Pay?": "apple_pay_or_google_pay",
    }
    model = backend._models["banking77"].spec
    assert len(model.labels) == 77
    probabilities = await backend.classify(_call("banking77", tokenizer(list(expected))["input_ids"]))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    named = [model.labels[index] for index in probabilities.argmax(axis=1)]
    right = sum(name == label for name, label in zip(named, expected.values(), strict=True))
    assert right >= 5, named


def test_banking77_card_states_the_measured_accuracy() -> None:
    record = json.loads((banking77.ASSETS / "head.json").read_text())
    card = (banking77.ASSETS / "README.md").read_text()
    assert record["test_correct"] / record["test_rows"] >= 0.92
    assert f"{100 * record['test_accuracy']:.2f} %" in card
    assert "CC-BY-4.0" in card


def test_building_banking77_twice_gives_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    banking77.build(_ENCODER, tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert all((tmp_path / name).read_bytes() == (folders["banking77"] / name).read_bytes() for name in files)


@in_module_loop
@pytest.mark.parametrize("model", ["banking77", "multi", "roberta-head"])
async def test_probabilities_are_those_of_transformers(
    model: str, backend: BERTBackend, folders: dict[str, Path]
) -> None:
    inputs = _ids(4, 30, 11, 30)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(folders[model]).eval()
    with torch.inference_mode():
        logits = torch.cat([reference(torch.tensor([ids])).logits for ids in inputs])
    expected = logits.sigmoid() if model == "multi" else logits.softmax(dim=-1)
    assert backend._models[model].is_packed
    np.testing.assert_allclose(await backend.classify(_call(model, inputs)), expected.numpy(), rtol=1e-3, atol=1e-4)


@in_module_loop
async def test_a_bi_encoder_ranks_by_cosine(backend: BERTBackend, tokenizer: Any) -> None:
    documents = ["Paris is the capital of France.", "I like trains.", "Berlin is the capital of Germany."]
    ids = tokenizer(["Which city is the capital of France?", *documents])["input_ids"]
    scores = await backend.rerank(_call("minilm", ids))
    rows = await backend.embed(_call("minilm", ids))
    assert scores.shape == (3,)
    assert list(np.argsort(-scores)) == [0, 2, 1]
    np.testing.assert_allclose(scores, rows[1:] @ rows[0], atol=1e-5)


@in_module_loop
async def test_a_bi_encoder_that_does_not_normalise_still_ranks_by_cosine(backend: BERTBackend) -> None:
    rows = await backend.embed(_call("max", _ids(5, 9, 30)))
    assert np.linalg.norm(rows, axis=1).max() > 1.5
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores = await backend.rerank(_call("max", _ids(5, 9, 30)))
    np.testing.assert_allclose(scores, unit[1:] @ unit[0], rtol=1e-4, atol=1e-5)


@in_module_loop
async def test_a_cross_encoder_scores_pairs_as_transformers_does(
    backend: BERTBackend, folders: dict[str, Path], tokenizer: Any
) -> None:
    documents = ["Paris.", "A much longer document about trains and their timetables.", "Berlin is large."]
    pairs = tokenizer(["capital of France"] * 3, documents)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(folders["cross"]).eval()
    with torch.inference_mode():
        logits = reference(**tokenizer(["capital of France"] * 3, documents, padding=True, return_tensors="pt")).logits
    call = _call("cross", pairs["input_ids"], type_ids=pairs["token_type_ids"])
    scores = await backend.rerank(call)
    np.testing.assert_allclose(scores, logits[:, 0].sigmoid().numpy(), rtol=1e-3, atol=1e-4)
    without_types = await backend.rerank(_call("cross", pairs["input_ids"]))
    assert np.abs(scores - without_types).max() > 1e-3


@in_module_loop
async def test_calls_with_and_without_type_ids_share_a_pass(
    backend: BERTBackend, gate: _Gate, install: Callable[[], None]
) -> None:
    inputs = _ids(9)
    types = [[0] * 4 + [1] * 5]
    alone = [await backend.rerank(_call("cross", inputs, type_ids=kind)) for kind in (types, None)]
    install()
    first = asyncio.create_task(backend.embed(_call("mean", _ids(6))))
    await gate.wait_until_held()
    together = [asyncio.create_task(backend.rerank(_call("cross", inputs, type_ids=kind))) for kind in (types, None)]
    await asyncio.sleep(0)
    gate.open()
    scores = [await task for task in together]
    await first
    assert gate.batches == [[6], [9, 9]]
    np.testing.assert_allclose(scores, alone, rtol=1e-4, atol=1e-5)


@in_module_loop
async def test_dimensions_are_cut_and_normalised_again(backend: BERTBackend) -> None:
    whole = await backend.embed(_call("minilm", _ids(9, 30)))
    cut = await backend.embed(_call("minilm", _ids(9, 30), dimensions=64))
    assert cut.shape == (2, 64)
    assert cut.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-5)
    expected = whole[:, :64] / np.linalg.norm(whole[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-5)


@in_module_loop
@pytest.mark.parametrize(
    ("task", "call"),
    [
        ("embed", _call("nobody", _ids(5))),
        ("embed", _call("banking77", _ids(5))),
        ("classify", _call("minilm", _ids(5))),
        ("embed", _call("minilm", [])),
        ("embed", _call("minilm", [[101], []])),
        ("embed", _call("minilm", _ids(257))),
        ("embed", _call("minilm", [[101, 30_522]])),
        ("embed", _call("minilm", [[101, -1]])),
        ("embed", _call("minilm", _ids(5), dimensions=385)),
        ("embed", _call("minilm", _ids(5), dimensions=0)),
        ("rerank", _call("minilm", _ids(5))),
        ("rerank", _call("cross", _ids(5), type_ids=[[0, 1]])),
        ("rerank", _call("cross", _ids(5), type_ids=[[0, 0, 0, 1, 2]])),
    ],
)
async def test_what_can_never_succeed_is_refused_before_it_joins_a_batch(
    task: str, call: EncodeCall, backend: BERTBackend
) -> None:
    passes = backend.num_forward_passes
    with pytest.raises(InvalidCall):
        await getattr(backend, task)(call)
    assert backend.num_forward_passes == passes


@in_module_loop
async def test_bfloat16_stays_close(backend: BERTBackend, tmp_path: Path, tokenizer: Any, texts: list[str]) -> None:
    half = _backend({"minilm": _ENCODER}, tmp_path / "switchyard.yaml", dtype="bfloat16")
    await half.start()
    call = _call("minilm", tokenizer(texts[:60], truncation=True, max_length=256)["input_ids"])
    rows = await half.embed(call)
    await half.stop()
    cosines = (rows * await backend.embed(call)).sum(axis=1)
    assert rows.dtype == np.float32
    assert 0.999 <= cosines.min() < 0.9999999


@pytest.mark.parametrize("options", [{"max_batch_size": 8}, {"max_batch_tokens": 0}])
def test_options_that_mean_nothing_are_refused(
    options: dict[str, int], folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="max_batch"):
        _backend({"tiny": folders["mean"]}, tmp_path / "switchyard.yaml", **options)


@in_module_loop
async def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    model = transformers.BertModel(transformers.BertConfig(**_TINY))
    model.config.architectures = ["BertModel"]
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    pickled = _backend({"pickled": tmp_path / "pickled"}, tmp_path / "switchyard.yaml")
    with pytest.raises(OSError, match="safetensors"):
        await pickled.start()
