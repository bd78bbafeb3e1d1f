"""Token ids: equal to transformers' for ordinary text, safe for text that spells special tokens, and bounded."""

import functools
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import catalog
import settings as environment
from api import errors, prompts, schemas
from api.prompts import ByteTokenizer, FolderTokenizer, Prompts
from api.schemas.responses import ResponseRequest
from api.schemas.tokenize import TokenizeRequest
from catalog import Catalog, ModelSpec
from tasks.call import Call

GENERATOR, ENCODER, ECHO = "smollm2-135m-instruct", "all-minilm-l6-v2", "echo"
CONTEXT = 300
CONFIG = f"""
backends:
  gpt: {{runtime: gpt}}
  bert: {{runtime: bert}}
  echo: {{runtime: echo}}
models:
  {GENERATOR}: {{path: {GENERATOR}, backends: [gpt], context_length: {CONTEXT}, default_max_tokens: 64}}
  {ENCODER}: {{path: {ENCODER}, backends: [bert]}}
  {ECHO}: {{path: none, backends: [echo], context_length: 1000}}
"""
SYSTEM = {"role": "system", "content": "Answer briefly."}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    config = tmp_path_factory.mktemp("catalog") / "switchyard.yaml"
    config.write_text(CONFIG)
    return catalog.load(config, environment.load().models_dir)


@pytest.fixture(scope="module")
def encoding(models: Catalog) -> Any:
    found = Prompts(models)
    yield found
    found.close()


def transformers_tokenizer(model: ModelSpec) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.path, local_files_only=True)


@pytest.fixture(scope="module")
def generator(models: Catalog) -> Any:
    return transformers_tokenizer(models.models[GENERATOR])


@pytest.fixture(scope="module")
def encoder(models: Catalog) -> Any:
    return transformers_tokenizer(models.models[ENCODER])


def chat(*messages: dict[str, str] | str, model: str = GENERATOR, **fields: Any) -> Call:
    listed = [{"role": "user", "content": given} if isinstance(given, str) else given for given in messages]
    return schemas.parse("/v1/chat/completions", {"model": model, "messages": listed} | fields)


def completion(prompt: Any, model: str = GENERATOR, **fields: Any) -> Call:
    return schemas.parse("/v1/completions", {"model": model, "prompt": prompt} | fields)


def embedding(texts: Any, model: str = ENCODER) -> Call:
    return schemas.parse("/v1/embeddings", {"model": model, "input": texts})


def rerank(query: str, documents: list[str], model: str = ENCODER) -> Call:
    return schemas.parse("/v1/rerank", {"model": model, "query": query, "documents": documents})


async def tokenised(encoding: Prompts, models: Catalog, call: Call) -> Call:
    return await encoding.tokenise(call, models.models[call.model])


async def refused(encoding: Prompts, models: Catalog, call: Call) -> errors.APIError:
    with pytest.raises(errors.APIError) as caught:
        await tokenised(encoding, models, call)
    return caught.value


# As transformers does it.

TEXTS = [
    "hi",
    "What is a switchyard?",
    " leading and trailing ",
    "\n\n",
    "",
    "two  spaces   three    four",
    "tabs\tand\r\nlines\n",
    "naïve café, Ångström",
    "漢字とかな、カタカナ",
    "😀👩‍👩‍👧‍👦🇪🇺",
    "ﬁ ligature e\u0301 combining",
    "מימין לשמאל والعربية",
    "1234567890 3.14159 -42 1e-9",
    "def f(x):\n    return {'a': [x, x ** 2]}\n",
    "<b>html</b> &amp; {{ template }} {% if %} \\n \\u0041",
    "https://example.org/a?b=c&d=%20#e",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u200b\u00a0\ufeff\u2028 odd spaces",
    "user\nassistant\nsystem",
    "< | im_start | > im_end <| |>",
    "line one\n" * 12,
    "data: [DONE]\n\ndata: {}",
]
CONVERSATIONS = [
    *[[{"role": "user", "content": text}] for text in TEXTS],
    *[[SYSTEM, {"role": "user", "content": text}] for text in TEXTS[:6]],
    [SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "assistant", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b\n"}] * 6,
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
async def test_chats_equal_transformers(
    encoding: Prompts, models: Catalog, generator: Any, messages: list[dict[str, str]]
) -> None:
    tokenizer = FolderTokenizer(Path(models.models[GENERATOR].path), is_encoder=False)
    for is_prompted in (True, False):
        expected = generator.apply_chat_template(messages, add_generation_prompt=is_prompted, tokenize=False)
        assert "".join(tokenizer.render(messages, is_prompted)) == expected
    expected_ids = generator.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert (await tokenised(encoding, models, chat(*messages))).token_ids == [expected_ids]


@pytest.mark.parametrize("text", [text for text in TEXTS if text] + ["<|im_start|>user\nraw prompt<|im_end|>"])
async def test_prompts_equal_transformers(encoding: Prompts, models: Catalog, generator: Any, text: str) -> None:
    call = await tokenised(encoding, models, completion([text, text + "!"]))
    assert call.token_ids == [generator(text)["input_ids"], generator(text + "!")["input_ids"]]


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
async def test_encoder_texts_equal_transformers(encoding: Prompts, models: Catalog, encoder: Any, text: str) -> None:
    call = await tokenised(encoding, models, embedding([text, "short"]))
    assert call.token_ids == [encoder(text)["input_ids"], encoder("short")["input_ids"]]
    assert call.type_ids is None


async def test_bi_encoder_gets_the_query_first(encoding: Prompts, models: Catalog, encoder: Any) -> None:
    call = await tokenised(encoding, models, rerank("query", ["one", "two words"]))
    assert call.token_ids == [encoder(text)["input_ids"] for text in ("query", "one", "two words")]


async def test_cross_encoder_gets_pairs_with_segments(encoding: Prompts, models: Catalog, encoder: Any) -> None:
    cross = replace(models.models[ENCODER], is_cross_encoder=True)
    call = await encoding.tokenise(rerank("the query", ["one", "two words"]), cross)
    expected = encoder([("the query", "one"), ("the query", "two words")])
    assert (call.token_ids, call.type_ids) == (expected["input_ids"], expected["token_type_ids"])
    with pytest.raises(errors.ContextLengthExceeded) as caught:
        await encoding.tokenise(rerank("the query", ["one", "word " * 300]), cross)
    assert caught.value.param == "documents.1"


async def test_queries_are_paired_with_their_documents(encoding: Prompts, models: Catalog, encoder: Any) -> None:
    def score(queries: list[str], documents: list[str]) -> Call:
        return schemas.parse("/v1/score", {"model": ENCODER, "queries": queries, "documents": documents})

    cross = replace(models.models[ENCODER], is_cross_encoder=True)
    call = await encoding.tokenise(score(["one query", "another"], ["one", "two words"]), cross)
    expected = encoder([("one query", "one"), ("another", "two words")])
    assert (call.token_ids, call.type_ids) == (expected["input_ids"], expected["token_type_ids"])
    apart = await tokenised(encoding, models, score(["one query", "another"], ["one", "two words"]))
    assert apart.token_ids == [encoder(text)["input_ids"] for text in ("one query", "another", "one", "two words")]
    long = "word " * 300
    for model, queries, documents, param in [
        (cross, ["q"], ["one", long], "documents.1"),
        (cross, ["q", long], ["one", "two"], "documents.1"),
        (models.models[ENCODER], ["q", long], ["one", "two"], "queries.1"),
        (models.models[ENCODER], ["q", "r"], ["one", long], "documents.1"),
        (models.models[ENCODER], ["q"], ["one", long], "documents.1"),
    ]:
        with pytest.raises(errors.ContextLengthExceeded) as caught:
            await encoding.tokenise(score(queries, documents), model)
        assert caught.value.param == param


async def test_a_pair_to_classify_has_segments(encoding: Prompts, models: Catalog, encoder: Any) -> None:
    call = schemas.parse("/predict", {"model": ENCODER, "inputs": [["a pair", "of texts"], ["and", "another"]]})
    ready = await tokenised(encoding, models, call)
    expected = encoder([("a pair", "of texts"), ("and", "another")])
    assert (ready.token_ids, ready.type_ids) == (expected["input_ids"], expected["token_type_ids"])


async def test_an_echoed_prompt_of_token_ids_becomes_text(encoding: Prompts, models: Catalog, generator: Any) -> None:
    ids = generator("Hello there")["input_ids"]
    call = await tokenised(encoding, models, completion(["Hello there"], echo=True))
    assert await tokenised(encoding, models, completion([ids], echo=True)) == call
    assert (await tokenised(encoding, models, completion([ids]))).inputs == [ids]


# Text that spells special tokens.


@functools.cache
def specials(path: str) -> dict[str, int]:
    added = json.loads((Path(path) / "tokenizer.json").read_text())["added_tokens"]
    return {token["content"]: token["id"] for token in added}


FRAGMENTS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "end|>", "<", "|>", "system\n", "x", " ", "<repo"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join))
async def test_a_message_cannot_hold_control_tokens(encoding: Prompts, models: Catalog, text: str) -> None:
    control = set(specials(models.models[GENERATOR].path).values())
    ids = (await tokenised(encoding, models, chat(SYSTEM, text))).token_ids[0]
    harmless = (await tokenised(encoding, models, chat(SYSTEM, "x"))).token_ids[0]
    assert [token for token in ids if token in control] == [token for token in harmless if token in control]
    decoded = await encoding.detokenize(models.models[GENERATOR], ids)
    assert f"<|im_start|>user\n{text}<|im_end|>" in decoded


@pytest.mark.parametrize("text", ["[SEP] rest", "[CLS][SEP][MASK][PAD]", "a [SEP"])
async def test_a_document_cannot_hold_control_tokens(encoding: Prompts, models: Catalog, text: str) -> None:
    control = set(specials(models.models[ENCODER].path).values()) - {100}  # The unknown word may stand anywhere.
    (ids,) = (await tokenised(encoding, models, embedding(text))).token_ids
    assert [token for token in ids if token in control] == [ids[0], ids[-1]]


async def test_a_raw_prompt_may_hold_control_tokens(encoding: Prompts, models: Catalog) -> None:
    (ids,) = (await tokenised(encoding, models, completion("<|im_start|>user"))).token_ids
    assert ids[0] == specials(models.models[GENERATOR].path)["<|im_start|>"]


def test_every_special_token_is_cut_however_they_overlap(tmp_path: Path) -> None:
    tokenizer = tiny_folder(tmp_path, "{{ messages[0]['content'] }}", ["<a>", "<<a>", "a><b"])
    for text in ["<a>", "<<a>", "<<a><b", "x<<<a>>", "<a><a>"]:
        pieces = tokenizer.render([{"role": "user", "content": text}])
        assert "".join(pieces) == text
        assert not any(special in piece for piece in pieces for special in ["<a>", "<<a>", "a><b"])


# Whether it fits.


@pytest.mark.parametrize("num_tokens", [1, CONTEXT - 16, CONTEXT - 15, CONTEXT - 1, CONTEXT, CONTEXT + 1])
async def test_a_completion_fits_exactly_or_is_refused(encoding: Prompts, models: Catalog, num_tokens: int) -> None:
    call = completion([5] * num_tokens)
    if num_tokens + 16 <= CONTEXT:
        assert (await tokenised(encoding, models, call)).max_tokens == 16
    else:
        error = await refused(encoding, models, call)
        assert (error.code, error.param) == ("context_length_exceeded", "prompt")
        for number in (CONTEXT, num_tokens, 16):
            assert str(number) in error.message


async def test_max_tokens_of_a_chat_is_the_default_or_what_is_left(encoding: Prompts, models: Catalog) -> None:
    overhead = len((await tokenised(encoding, models, chat(SYSTEM, ""))).token_ids[0])
    for num_words, expected in [(1, 64), (CONTEXT - overhead - 10, 10), (CONTEXT - overhead - 1, 1)]:
        call = await tokenised(encoding, models, chat(SYSTEM, " word" * num_words))
        assert (len(call.token_ids[0]), call.max_tokens) == (overhead + num_words, expected)
    error = await refused(encoding, models, chat(SYSTEM, " word" * (CONTEXT - overhead)))
    assert (error.code, error.param) == ("context_length_exceeded", "messages")
    assert (await tokenised(encoding, models, chat("hi", max_tokens=200))).max_tokens == 200
    assert (await refused(encoding, models, chat("hi", max_tokens=CONTEXT))).code == "context_length_exceeded"


async def test_each_sequence_is_checked_and_named(encoding: Prompts, models: Catalog) -> None:
    long = "word " * 400
    assert (await refused(encoding, models, completion(["hi", long]))).param == "prompt.1"
    assert (await refused(encoding, models, embedding(["hi", long]))).param == "input.1"
    assert (await refused(encoding, models, embedding(long))).param == "input"
    assert (await refused(encoding, models, rerank(long, ["hi"]))).param == "query"
    assert (await refused(encoding, models, rerank("hi", ["hi", long]))).param == "documents.1"


async def test_encoder_limit_is_exact(encoding: Prompts, models: Catalog) -> None:
    limit = models.models[ENCODER].context_length
    call = await tokenised(encoding, models, embedding("a " * (limit - 2)))
    assert len(call.token_ids[0]) == limit
    error = await refused(encoding, models, embedding("a " * (limit - 1)))
    assert error.code == "context_length_exceeded"
    assert str(limit + 1) in error.message


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (completion([1, 49_152]), "prompt"),
        (completion([[1], [2**31 - 1]]), "prompt.1"),
        (chat("hi", stop_token_ids=[49_152]), "stop_token_ids"),
        (chat("hi", logit_bias={"49152": 1}), "logit_bias"),
        (embedding([[5], [30_522]]), "input.1"),
        (completion([256], model=ECHO), "prompt"),
    ],
)
async def test_token_ids_outside_the_vocabulary(encoding: Prompts, models: Catalog, call: Call, param: str) -> None:
    error = await refused(encoding, models, call)
    assert (error.code, error.param) == ("validation_error", param)


async def test_last_token_ids_of_the_vocabulary_are_taken_as_given(encoding: Prompts, models: Catalog) -> None:
    call = chat("hi", stop_token_ids=[49_151], logit_bias={"49151": 1})
    assert (await tokenised(encoding, models, call)).params == {"logit_bias": {49_151: 1.0}, "stop_token_ids": [49_151]}
    assert (await tokenised(encoding, models, completion([49_151]))).token_ids == [[49_151]]
    assert (await tokenised(encoding, models, embedding([30_521]))).token_ids == [[30_521]]


async def test_min_tokens_must_fit_what_max_tokens_turns_out_to_be(encoding: Prompts, models: Catalog) -> None:
    assert (await tokenised(encoding, models, chat("hi", min_tokens=64))).max_tokens == 64
    error = await refused(encoding, models, chat("hi", min_tokens=65))
    assert (error.code, error.param) == ("number_out_of_range", "min_tokens")


@pytest.mark.parametrize("text", ["a", " ", "ab", "漢", "1", "\n", "https://", "é́", "<|im_end|>"])
async def test_a_megabyte_is_judged_in_time_and_off_the_loop(encoding: Prompts, models: Catalog, text: str) -> None:
    long = text * (1_000_000 // len(text.encode()))
    for call in (chat(long), completion(long)):
        started = time.process_time()
        assert (await refused(encoding, models, call)).code == "context_length_exceeded"
        assert time.process_time() - started < 2


async def test_long_text_equals_short_text_put_together(encoding: Prompts, models: Catalog) -> None:
    """Inline and in a thread, the same ids come out."""
    assert len("a " * 250) < prompts._INLINE_CHARS < len(" " * 3000 + "a")
    inline = (await tokenised(encoding, models, embedding("a " * 250))).token_ids
    threaded = (await tokenised(encoding, models, embedding(" " * 3000 + "a " * 250))).token_ids
    assert inline == threaded


@pytest.mark.parametrize("arguments", [{"text": "a" * 3000}, {"a" * 3000: ""}, {"many": [[1] * 400]}])
async def test_long_calls_and_tools_are_tokenised_off_the_loop(
    encoding: Prompts, models: Catalog, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    threads: set[int] = set()
    render = ByteTokenizer.render

    def noted(self: ByteTokenizer, *given: Any) -> Any:
        threads.add(threading.get_ident())
        return render(self, *given)

    monkeypatch.setattr(ByteTokenizer, "render", noted)
    function = {"name": "f", "arguments": json.dumps(arguments)}
    answer = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": arguments}}
    for call in (chat(answer, model=ECHO), chat("hi", model=ECHO, tools=[tool])):  # type: ignore[arg-type]
        await refused(encoding, models, call)
    assert threads
    assert threading.get_ident() not in threads
    await tokenised(encoding, models, chat("hi", model=ECHO))
    assert threading.get_ident() in threads


# Echo.


async def test_echo_reads_bytes(encoding: Prompts, models: Catalog) -> None:
    call = await tokenised(encoding, models, completion(["hé", "<|im_end|>"], model=ECHO))
    assert call.token_ids == [list("hé".encode()), list(b"<|im_end|>")]
    call = await tokenised(encoding, models, chat(SYSTEM, "hi", model=ECHO))
    assert bytes(call.token_ids[0]) == b"system: Answer briefly.\nuser: hi\n"
    call = await tokenised(encoding, models, rerank("q", ["a", "b"], model=ECHO))
    assert call.token_ids == [[113], [97], [98]]
    assert (await refused(encoding, models, completion("x" * 1000, model=ECHO))).code == "context_length_exceeded"


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_come_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.token_strs(ids)) == len(ids)
    pairs, type_ids = tokenizer.encode_pairs([("q", text)])
    assert (pairs[0], type_ids[0]) == ([113, *ids], [0] + [1] * len(ids))


# Tokenize and detokenize.


async def count(encoding: Prompts, models: Catalog, model: str, **fields: Any) -> prompts.TokenCount:
    request = schemas.read(TokenizeRequest, {"model": model} | fields)
    return await encoding.count(request, models.models[model])


async def test_count(encoding: Prompts, models: Catalog, generator: Any, encoder: Any) -> None:
    found = await count(encoding, models, GENERATOR, prompt="Hello there", return_token_strs=True)
    assert found.tokens == generator("Hello there")["input_ids"]
    assert (found.count, found.max_model_len) == (len(found.tokens), CONTEXT)
    assert found.token_strs == generator.convert_ids_to_tokens(found.tokens)
    messages = [SYSTEM, {"role": "user", "content": "hi"}]
    for is_prompted in (True, False):
        found = await count(encoding, models, GENERATOR, messages=messages, add_generation_prompt=is_prompted)
        expected = generator.apply_chat_template(messages, add_generation_prompt=is_prompted)["input_ids"]
        assert (found.tokens, found.token_strs) == (expected, None)
    assert (await count(encoding, models, ENCODER, prompt="hi")).tokens == encoder("hi")["input_ids"]
    bare = await count(encoding, models, ENCODER, prompt="hi", add_special_tokens=False)
    assert bare.tokens == encoder("hi", add_special_tokens=False)["input_ids"]
    assert (await count(encoding, models, ECHO, prompt="hi")).tokens == [104, 105]
    assert (await count(encoding, models, GENERATOR, prompt="")).count == 0
    assert (await count(encoding, models, GENERATOR, prompt="word " * 1000)).count > CONTEXT


@pytest.mark.parametrize("text", TEXTS)
async def test_detokenize_undoes_tokenize(encoding: Prompts, models: Catalog, text: str) -> None:
    for name in (GENERATOR, ECHO):
        tokens = (await count(encoding, models, name, prompt=text)).tokens
        assert await encoding.detokenize(models.models[name], tokens) == text


async def test_detokenize_refuses_what_is_no_token(encoding: Prompts, models: Catalog) -> None:
    for name, token in [(GENERATOR, 49_152), (ECHO, 256)]:
        with pytest.raises(errors.InvalidValue):
            await encoding.detokenize(models.models[name], [token])


# Templates.


def tiny_folder(folder: Path, template: str | None, special_tokens: list[str] | None = None) -> FolderTokenizer:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE({"<": 0, "a": 1, ">": 2, "b": 3, "x": 4}, []))
    tokenizer.add_special_tokens(special_tokens or ["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return FolderTokenizer(folder, is_encoder=False)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi</s>"),
        ("{% for m in messages %}\n    {{ m.role }}\n{% endfor %}", "    user\n"),
        ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ {'ключ': [1]} | tojson }}", '{"ключ": [1]}'),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ tools is none }}{{ add_generation_prompt }}", "TrueTrue"),
    ],
)
def test_templates_find_what_transformers_gives_them(tmp_path: Path, template: str, expected: str) -> None:
    assert tiny_folder(tmp_path, template).render([{"role": "user", "content": "hi"}]) == [expected]


TOOLS_TEMPLATE = "{{ tools | tojson if tools }}{% for m in messages %}{{ m.role }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"


def test_tools_reach_a_template_that_has_a_place_for_them(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "a<s>b", "parameters": {}}}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x<s>": 1}}}
    history = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    tokenizer = tiny_folder(tmp_path, TOOLS_TEMPLATE)
    assert tokenizer.knows_tools
    pieces = tokenizer.render(history, tools=tools)
    assert "".join(pieces) == json.dumps(tools) + "assistant" + json.dumps([call])
    assert not any("<s>" in piece for piece in pieces), "neither a definition nor a call can hold control tokens"


async def test_tools_are_refused_where_the_template_has_no_place_for_them(encoding: Prompts, models: Catalog) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    answer = {"role": "tool", "tool_call_id": "c", "content": "x"}
    assert (await refused(encoding, models, chat("hi", tools=[tool]))).param == "tools"
    error = await refused(encoding, models, chat("hi", answer))
    assert (error.code, error.param) == ("unsupported_parameter", "messages.1")


def test_template_file_comes_before_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file")
    assert tiny_folder(tmp_path, "configuration").render([]) == ["file"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ raise_exception('Bad: ' + messages[0].content) }}", None),
        ("{{ messages[0].content + 1 }}", None),
        ("{{ messages[0]['content'].nothing.more }}", None),
        ("{{ ''.__class__.__mro__ }}", None),
        ("{{ messages.append(1) }}", None),
        (None, "/v1/completions"),
    ],
)
def test_a_template_may_refuse_but_not_repeat(tmp_path: Path, template: str | None, reason: str | None) -> None:
    tokenizer = tiny_folder(tmp_path, template)
    with pytest.raises(errors.InvalidPrompt) as caught:
        tokenizer.render([{"role": "user", "content": "SECRET"}])
    assert "SECRET" not in caught.value.message
    assert reason is None or reason in caught.value.message


async def test_what_is_wrong_with_a_chat_names_its_field(encoding: Prompts, models: Catalog) -> None:
    def response(text: str, model: str = GENERATOR) -> Call:
        return schemas.read(ResponseRequest, {"model": model, "input": text}).to_call()

    assert (await refused(encoding, models, response(" word" * CONTEXT))).param == "input"
    # The encoder has no chat template.
    for call, field in ((chat("hi", model=ENCODER), "messages"), (response("hi", ENCODER), "input")):
        error = await refused(encoding, models, call)
        assert (error.code, error.param) == ("invalid_prompt", field)


def test_a_folder_without_a_tokenizer_is_named(models: Catalog, tmp_path: Path) -> None:
    broken = replace(models.models[GENERATOR], path=str(tmp_path))
    with pytest.raises(catalog.CatalogError, match=r"tokenizer\.json"):
        Prompts(Catalog({GENERATOR: broken}, {}))
