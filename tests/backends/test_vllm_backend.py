"""The vLLM backend on the small real model: its sampling against Transformers, its scheduling, its processes.

One engine serves most tests, in float32 so that its greedy choices can be held against another
implementation's. The test of death and orphans runs a second process (`_HOLDER`), because it kills it.
"""

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import pytest_asyncio
import torch
import transformers
import yaml
from tokenizers import Tokenizer

import catalog
import settings
from backends import vllm_orphans
from backends.base import Chunk, GenerateCall, InvalidCall, SamplingParams
from backends.vllm_backend import VLLMBackend

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    # vLLM is imported in this process and warns of its own and of torch's retirements.
    pytest.mark.filterwarnings("ignore"),
]
in_module_loop = pytest.mark.asyncio(loop_scope="module")

_ROOT = Path(__file__).parents[2]
_MODELS = settings.load().models_dir.absolute()
_FOLDER = _MODELS / "smollm2-135m-instruct"
_OPTIONS = {"dtype": "float32", "max_num_seqs": 4, "kv_cache_memory_gib": 0.25}
_EOS = 2
_ids = itertools.count()


def _spec(folder: Path, models: tuple[str, ...] = ("smol",), **options: Any) -> catalog.BackendSpec:
    entry = {"path": str(_FOLDER), "backends": ["vllm"], "context_length": 512}
    config = {
        "backends": {"vllm": {"runtime": "vllm", "options": {**_OPTIONS, **options}}},
        "models": dict.fromkeys(models, entry),
    }
    file = folder / "switchyard.yaml"
    file.write_text(yaml.safe_dump(config))
    return catalog.load(file, _MODELS).backends["vllm"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VLLMBackend]:
    started = VLLMBackend(_spec(tmp_path_factory.mktemp("vllm")))
    await started.start()
    yield started
    await started.stop()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(_FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference() -> Any:
    # Beside the engine's threads a second one here would mostly spin.
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(_FOLDER, dtype=torch.float32)


def _call(prompt: list[int], resumed: tuple[int, ...] = (), stream: bool = True, **params: Any) -> GenerateCall:
    chosen = SamplingParams(**{"max_tokens": 16, "temperature": 0.0, **params})
    return GenerateCall(f"call-{next(_ids)}", "smol", prompt, chosen, stream, resumed)


async def _chunks(backend: VLLMBackend, call: GenerateCall) -> list[Chunk]:
    return [chunk async for chunk in backend.generate(call)]


async def _run(backend: VLLMBackend, call: GenerateCall) -> tuple[tuple[int, ...], str, str | None]:
    """All tokens, all text, the reason of the end."""
    chunks = await _chunks(backend, call)
    assert [chunk.finish_reason is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
    return tokens, "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    texts = ["The capital of France is", "Once upon a time there was a fox who", "def fibonacci(n):", "Water boils at"]
    return [tokenizer.encode(text).ids for text in texts]


# --- what is generated ---


@in_module_loop
async def test_greedy_in_a_batch_is_what_transformers_generates(
    backend: VLLMBackend, prompts: list[list[int]], reference: Any, tokenizer: Tokenizer
) -> None:
    results = await asyncio.gather(*(_run(backend, _call(prompt, max_tokens=24)) for prompt in prompts))
    for prompt, (tokens, text, reason) in zip(prompts, results, strict=True):
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        assert tokens == tuple(expected.tolist())
        assert text == tokenizer.decode(list(tokens))
        assert reason == "length"


@in_module_loop
async def test_streamed_or_at_once_the_result_is_the_same(backend: VLLMBackend, prompts: list[list[int]]) -> None:
    streamed = await _chunks(backend, _call(prompts[1]))
    at_once = await _chunks(backend, _call(prompts[1], stream=False))
    assert len(streamed) > 4
    assert len(at_once) == 1
    assert at_once[0].token_ids == tuple(token for chunk in streamed for token in chunk.token_ids)
    assert at_once[0].text == "".join(chunk.text for chunk in streamed)
    assert at_once[0].finish_reason == streamed[-1].finish_reason == "length"


@in_module_loop
async def test_end_of_sequence_is_counted_and_not_shown(backend: VLLMBackend, tokenizer: Tokenizer) -> None:
    chat = "<|im_start|>user\nAnswer with one word: what is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    tokens, text, reason = await _run(backend, _call(tokenizer.encode(chat).ids, max_tokens=200))
    assert tokens[-1] == _EOS
    assert text == tokenizer.decode(list(tokens[:-1]))
    assert reason == "stop"


@in_module_loop
async def test_text_never_ends_inside_a_character(backend: VLLMBackend, prompts: list[list[int]]) -> None:
    """A token that is one byte of four: nothing until the end, then one replacement per character."""
    fox = Tokenizer.from_file(str(_FOLDER / "tokenizer.json")).encode("🦊").ids
    assert len(fox) > 1
    chunks = await _chunks(backend, _call(prompts[0], logit_bias={fox[0]: 100.0}, max_tokens=1))
    assert [chunk.text for chunk in chunks] == ["\ufffd"]
    tokens, text, _ = await _run(
        backend, _call(prompts[0], resumed=tuple(fox[:-1]), logit_bias={fox[-1]: 100.0}, max_tokens=len(fox))
    )
    assert (tokens, text) == (tuple(fox[-1:]), "🦊")


# --- parameters ---


@in_module_loop
async def test_logit_bias_forces_a_token(backend: VLLMBackend, prompts: list[list[int]]) -> None:
    tokens, _, reason = await _run(backend, _call(prompts[0], logit_bias={1234: 100.0}, max_tokens=3))
    assert (tokens, reason) == ((1234,) * 3, "length")


@in_module_loop
async def test_a_seed_decides_the_sample(backend: VLLMBackend, prompts: list[list[int]]) -> None:
    seeds = [7, 7, 8, -1, -1, 2**64 + 5]
    calls = [_call(prompts[1], temperature=1.0, seed=seed) for seed in seeds]
    seven, again, eight, minus, minus_again, _ = [tokens for tokens, _, _ in await _gather(backend, calls)]
    assert seven == again
    assert minus == minus_again
    assert len({seven, eight, minus}) == 3


async def _gather(backend: VLLMBackend, calls: list[GenerateCall]) -> list[tuple[tuple[int, ...], str, str | None]]:
    return await asyncio.gather(*(_run(backend, call) for call in calls))


@in_module_loop
@pytest.mark.parametrize("narrowing", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
async def test_a_sample_narrowed_to_the_best_token_is_greedy(
    backend: VLLMBackend, prompts: list[list[int]], narrowing: dict[str, Any]
) -> None:
    calls = [_call(prompts[1]), _call(prompts[1], temperature=1.0, **narrowing), _call(prompts[1], temperature=1.0)]
    greedy, narrowed, free = await _gather(backend, calls)
    assert narrowed == greedy
    assert free != greedy


@in_module_loop
async def test_logprobs_are_of_the_raw_distribution(
    backend: VLLMBackend, prompts: list[list[int]], reference: Any
) -> None:
    with torch.inference_mode():
        expected = torch.log_softmax(reference(torch.tensor([prompts[0]])).logits[0, -1], -1)
    best = expected.topk(3)
    call = _call(
        prompts[0], logprobs=3, logit_bias={1234: 100.0}, temperature=0.5, repetition_penalty=1.5, max_tokens=2
    )
    chunks = await _chunks(backend, call)
    logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
    assert [logprob.token_id for logprob in logprobs] == [1234, 1234]
    assert logprobs[0].logprob == pytest.approx(expected[1234].item(), abs=1e-3)
    assert [token for token, _ in logprobs[0].top] == best.indices.tolist()
    assert [value for _, value in logprobs[0].top] == pytest.approx(best.values.tolist(), abs=1e-3)


@in_module_loop
@pytest.mark.parametrize(("asked", "given"), [(None, None), (0, 0), (20, 20)])
async def test_as_many_alternatives_as_asked(
    backend: VLLMBackend, prompts: list[list[int]], asked: int | None, given: int | None
) -> None:
    (chunk,) = await _chunks(backend, _call(prompts[0], logprobs=asked, stream=False, max_tokens=4))
    if given is None:
        assert chunk.logprobs == ()
        return
    assert [logprob.token_id for logprob in chunk.logprobs] == list(chunk.token_ids)
    for logprob in chunk.logprobs:
        assert len(logprob.top) == given
        # Greedy: the sampled token is the best one.
        assert logprob.top[:1] in {(), ((logprob.token_id, logprob.logprob),)}
        assert [value for _, value in logprob.top] == sorted((value for _, value in logprob.top), reverse=True)


@in_module_loop
async def test_min_tokens_holds_the_end_back(backend: VLLMBackend, prompts: list[list[int]]) -> None:
    tokens, _, reason = await _run(backend, _call(prompts[0], logit_bias={_EOS: 100.0}, min_tokens=5))
    assert tokens.index(_EOS) == 5
    assert (len(tokens), reason) == (6, "stop")


@in_module_loop
async def test_ignore_eos_goes_on(backend: VLLMBackend, prompts: list[list[int]]) -> None:
    call = _call(prompts[0], logit_bias={_EOS: 100.0}, ignore_eos=True, max_tokens=4)
    assert await _run(backend, call) == ((_EOS,) * 4, "", "length")


@in_module_loop
async def test_a_stop_token_ends_and_is_not_shown(
    backend: VLLMBackend, prompts: list[list[int]], tokenizer: Tokenizer
) -> None:
    free, _, _ = await _run(backend, _call(prompts[1]))
    stop = free[8]
    until = free[: free.index(stop) + 1]
    tokens, text, reason = await _run(backend, _call(prompts[1], stop_token_ids=(stop,)))
    assert (tokens, reason) == (until, "stop")
    assert text == tokenizer.decode(list(until[:-1]))


@in_module_loop
@pytest.mark.parametrize(
    ("penalty", "counts_prompt"),
    [({"presence_penalty": 2.0}, False), ({"frequency_penalty": 2.0}, False), ({"repetition_penalty": 2.0}, True)],
)
async def test_a_penalty_first_changes_a_token_that_came_before(
    backend: VLLMBackend, prompts: list[list[int]], penalty: dict[str, Any], counts_prompt: bool
) -> None:
    (plain, *_), (penalised, *_) = await _gather(
        backend, [_call(prompts[2], max_tokens=40), _call(prompts[2], max_tokens=40, **penalty)]
    )
    first = next(i for i, (one, other) in enumerate(zip(plain, penalised, strict=True)) if one != other)
    assert plain[first] in (*plain[:first], *(prompts[2] if counts_prompt else ()))


# --- resuming ---


@in_module_loop
@pytest.mark.parametrize("params", [{}, {"frequency_penalty": 1.5}, {"repetition_penalty": 1.3}, {"min_tokens": 20}])
async def test_a_resumed_call_goes_on_where_it_stopped(
    backend: VLLMBackend, prompts: list[list[int]], params: dict[str, Any]
) -> None:
    whole = await _chunks(backend, _call(prompts[1], max_tokens=24, **params))
    tokens = tuple(token for chunk in whole for token in chunk.token_ids)
    text = "".join(chunk.text for chunk in whole)
    cuts = [1, 9, 23]
    resumed = await _gather(backend, [_call(prompts[1], resumed=tokens[:cut], max_tokens=24, **params) for cut in cuts])
    for cut, (rest, rest_text, reason) in zip(cuts, resumed, strict=True):
        before = "".join(chunk.text for chunk in _first(whole, cut))
        assert (tokens[:cut] + rest, before + rest_text, reason) == (tokens, text, whole[-1].finish_reason)


def _first(chunks: list[Chunk], tokens: int) -> Iterator[Chunk]:
    """The leading chunks that hold `tokens` tokens, which must not split a chunk."""
    seen = 0
    for chunk in chunks:
        if seen == tokens:
            return
        seen += len(chunk.token_ids)
        assert seen <= tokens, "the engine merged chunks; the cut falls inside one"
        yield chunk


@in_module_loop
async def test_nothing_is_generated_after_a_finished_attempt(backend: VLLMBackend, prompts: list[list[int]]) -> None:
    full = _call(prompts[0], resumed=(5, 6, 7), max_tokens=3)
    assert await _chunks(backend, full) == [Chunk((), "", "length")]
    ended = _call(prompts[0], resumed=(5, _EOS), max_tokens=9)
    assert await _chunks(backend, ended) == [Chunk((), "", "stop")]
    stopped = _call(prompts[0], resumed=(5, 6), max_tokens=9, stop_token_ids=(6,))
    assert await _chunks(backend, stopped) == [Chunk((), "", "stop")]
    going_on = _call(prompts[0], resumed=(5, _EOS), max_tokens=4, ignore_eos=True)
    assert len((await _run(backend, going_on))[0]) == 2


# --- scheduling ---


@in_module_loop
@pytest.mark.parametrize("way", ["close", "cancel"])
async def test_leaving_a_stream_frees_its_slot(backend: VLLMBackend, prompts: list[list[int]], way: str) -> None:
    """Four long streams hold the four slots; a fifth gets its first token when, and only when, one leaves."""
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(_opened(backend, prompts[0])) for _ in range(4)]
        for _ in range(2):
            await asyncio.gather(*(anext(stream) for stream in streams))
        fifth = asyncio.create_task(_run(backend, _call(prompts[1], max_tokens=1)))
        for _ in range(5):
            await asyncio.gather(*(anext(stream) for stream in streams))
        assert not fifth.done()
        if way == "close":
            await streams[0].aclose()
        else:
            reader = asyncio.create_task(_read_to_the_end(streams[0]))
            await anext(streams[1])
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        await fifth
        # The others have not ended: the slot is the one that was left.
        assert [(await anext(stream)).finish_reason for stream in streams[1:]] == [None] * 3


def _opened(backend: VLLMBackend, prompt: list[int]) -> "aclosing[AsyncGenerator[Chunk]]":
    stream = backend.generate(_call(prompt, max_tokens=480, ignore_eos=True))
    return aclosing(cast("AsyncGenerator[Chunk]", stream))


async def _read_to_the_end(stream: AsyncIterator[Chunk]) -> None:
    async for _ in stream:
        pass


# --- what is refused ---


@in_module_loop
@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([1] * 513, {}),
        ([], {}),
        ([10**6], {}),
        ([1, 2], {"temperature": 5.0}),
        ([1, 2], {"logit_bias": {10**6: 1.0}}),
        ([1, 2], {"logprobs": 21}),
        ([1, 2], {"min_tokens": 17}),
    ],
)
async def test_an_impossible_call_is_refused_and_harms_no_other(
    backend: VLLMBackend, prompts: list[list[int]], prompt: list[int], params: dict[str, Any]
) -> None:
    other = asyncio.create_task(_run(backend, _call(prompts[0])))
    with pytest.raises(InvalidCall, match=r"\w"):
        await _run(backend, _call(prompt, **params))
    assert (await other)[2] == "length"
    backend.check_health()


@in_module_loop
async def test_a_model_it_does_not_hold_is_refused(backend: VLLMBackend) -> None:
    with pytest.raises(InvalidCall, match="does not hold the model 'other'"):
        await _chunks(backend, replace(_call([1]), model="other"))


def test_an_unknown_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(catalog.CatalogError, match=r"^backends\.vllm\.options: vllm has no option 'max_seqs'; known: "):
        VLLMBackend(_spec(tmp_path, max_seqs=4))


async def test_an_option_of_the_wrong_kind_is_refused_before_anything_starts(tmp_path: Path) -> None:
    backend = VLLMBackend(_spec(tmp_path, dtype="float13"))
    before = set(multiprocessing.active_children())
    with pytest.raises(catalog.CatalogError, match=r"^backends\.vllm\.options, model smol: .*float13"):
        await backend.start()
    assert set(multiprocessing.active_children()) == before


async def test_it_does_not_start_without_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_orphans, "entry_points", lambda group: ())
    with pytest.raises(vllm_orphans.PluginMissingError, match="pip install"):
        await VLLMBackend(_spec(tmp_path)).start()


def test_an_allow_list_of_plugins_is_extended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    monkeypatch.setenv(vllm_orphans.HOLDER_ENV, "")
    vllm_orphans.arm()
    allowed = os.environ["VLLM_PLUGINS"].split(",")
    assert allowed[:2] == ["theirs", "switchyard_orphans"]


def test_importing_it_loads_no_runtime() -> None:
    code = "import sys, backends.vllm_backend; print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- processes ---

_HOLDER = """
import asyncio, json, os, signal, sys, threading, time
from pathlib import Path
from backends.base import BackendDead
from tests.backends.test_vllm_backend import _call, _run, _spec
from backends.vllm_backend import VLLMBackend


def say(**what):
    print(json.dumps(what), flush=True)


async def hold(folder):
    backend = VLLMBackend(_spec(Path(folder), models=("smol", "twin")))
    await backend.start()
    engines = {name: [p.pid for p in engine.processes] for name, engine in backend._engines.items()}
    say(engines=engines)
    running = asyncio.create_task(_run(backend, _call([1, 2, 3], max_tokens=60, ignore_eos=True)))
    stream = backend.generate(_call([1, 2, 3], max_tokens=480, ignore_eos=True))
    await anext(stream)
    say(generating=True)
    tokens, _, reason = await running
    say(tokens=len(tokens), reason=reason)
    await asyncio.to_thread(sys.stdin.readline)
    backend.check_health()
    os.kill(engines["smol"][0], signal.SIGKILL)
    killed = time.monotonic()
    try:
        async for _ in stream:
            pass
    except BackendDead:
        say(stream_dead_after=time.monotonic() - killed)
    try:
        backend.check_health()
    except BackendDead:
        say(health_dead_after=time.monotonic() - killed)
    await asyncio.Event().wait()


if __name__ == "__main__":
    # As in a worker: the engine belongs to a loop in a thread that is not the main one.
    signal.signal(signal.SIGTERM, lambda *_: None)
    thread = threading.Thread(target=asyncio.run, args=(hold(sys.argv[1]),))
    thread.start()
    thread.join()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds two engines, leading a process group of its own."""
    script = tmp_path / "holder.py"
    script.write_text(_HOLDER)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in (str(_ROOT), *sys.path) if path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.long
def test_processes_outlive_a_stray_sigterm_and_never_the_worker(holder: "subprocess.Popen[str]") -> None:
    """Each engine is one process for the EngineCore and one for its device: four children in all."""
    engines = _said(holder, "engines")
    smol, twin = (_family(engines[name][0]) for name in ("smol", "twin"))
    assert len(smol) == len(twin) == 2

    # A stop that reaches the whole group: what runs must end as if nothing had happened.
    _said(holder, "generating")
    os.killpg(holder.pid, signal.SIGTERM)
    assert _said(holder, "tokens") == 60
    assert _gone(smol + twin, within_s=0) == []

    # The EngineCore is killed: the stream and the health check tell, and its device process goes too.
    assert holder.stdin is not None
    holder.stdin.write("go on\n")
    holder.stdin.flush()
    assert _said(holder, "stream_dead_after") < 1
    assert _said(holder, "health_dead_after") < 1
    assert _gone(smol, within_s=2) == smol
    assert _gone(twin, within_s=0) == []

    # The worker is killed: nothing of it remains.
    holder.kill()
    assert _gone(twin, within_s=2) == twin


def _said(holder: "subprocess.Popen[str]", key: str) -> Any:
    """What the holder says under `key`; what it says before is passed over."""
    assert holder.stdout is not None
    for line in holder.stdout:
        if line.startswith("{") and key in (said := json.loads(line)):
            return said[key]
    raise AssertionError(f"the holder ended before it said {key}")


def _family(pid: int) -> list[int]:
    """`pid` and the vLLM processes below it, as pidfds: they turn readable when the process ends."""
    process = psutil.Process(pid)
    family = [process, *(child for child in process.children(recursive=True) if "VLLM" in child.name())]
    return [os.pidfd_open(member.pid) for member in family]


def _gone(pidfds: list[int], within_s: float) -> list[int]:
    """Those of `pidfds` whose process ends within the time."""
    deadline = time.monotonic() + within_s
    gone: set[int] = set()
    while len(gone) < len(pidfds):
        ready, _, _ = select.select(
            [fd for fd in pidfds if fd not in gone], [], [], max(0, deadline - time.monotonic())
        )
        gone.update(ready)
        if not ready:
            break
    return [fd for fd in pidfds if fd in gone]
