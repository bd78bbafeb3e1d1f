"""Two requests share an answer if, and only if, nothing that changes the answer is different."""

import json
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from api import fingerprints
from api.wishes import Wish
from catalog import ModelEntry, ModelSpec
from tasks.call import Call
from tests.properties import examples

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)
numbers = st.integers(-3, 3) | st.floats(-3, 3, allow_nan=False)
# Few and alike, so that two of them are often nearly the same.
small = st.sampled_from(["", "a", "b", "ab", '"', '","', "[", "]", "\u00e9", "e\u0301", "1"])
calls = st.builds(
    Call,
    endpoint=st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
    task=st.just("generate"),
    model=st.sampled_from(["m", "auto"]),
    messages=st.none() | st.lists(st.fixed_dictionaries({"role": small, "content": small}), max_size=2),
    inputs=st.lists(small | st.lists(st.integers(0, 2), max_size=2), max_size=3),
    n=st.integers(1, 2),
    max_tokens=st.none() | st.integers(1, 2),
    params=st.dictionaries(
        st.sampled_from(["temperature", "seed", "top_k"]), numbers | st.booleans() | st.none(), max_size=2
    ),
    stop=st.lists(small, max_size=2),
    stream=st.booleans(),
    include_usage=st.booleans(),
    format=st.dictionaries(small, small | st.booleans() | numbers, max_size=2),
    options=st.dictionaries(small, small | numbers, max_size=2),
    token_ids=st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=2),
)
MODEL = ModelSpec("m", "/m", ("generate",), 100, "r1", ModelEntry(path="m", backends=["b"]))


def meaning(call: Call) -> str:
    """What the answer depends on, by the standard library: `1`, `1.0` and `true` are three things."""
    return json.dumps(call.canonical(), sort_keys=True)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@examples(150)
@given(calls, calls)
def test_keys_are_equal_where_the_meaning_is(one: Call, other: Call) -> None:
    are_equal = fingerprints.cache_key(one, MODEL, "t") == fingerprints.cache_key(other, MODEL, "t")
    assert are_equal == (meaning(one) == meaning(other))


@examples()
@given(calls, st.data())
def test_what_does_not_change_the_answer_does_not_change_the_key(call: Call, data: st.DataObject) -> None:
    other = replace(
        call,
        stream=not call.stream,
        include_usage=not call.include_usage,
        token_ids=[],
        params=reordered(call.params),
        format=reordered(call.format),
        options=reordered(call.options),
        messages=reordered(call.messages),
    )
    assert fingerprints.cache_key(call, MODEL, "t") == fingerprints.cache_key(other, MODEL, "t")


@examples()
@given(calls, texts, texts)
def test_every_tenant_and_every_state_of_a_model_has_keys_of_its_own(call: Call, tenant: str, other: str) -> None:
    def key(model: ModelSpec = MODEL, owner: str = tenant) -> bytes:
        return fingerprints.cache_key(call, model, owner)

    assert (key(owner=other) == key()) == (tenant == other)
    changed = [
        replace(MODEL, name="n"),
        replace(MODEL, revision="r2"),
        replace(MODEL, context_length=99),
        replace(MODEL, entry=MODEL.entry.model_copy(update={"default_max_tokens": 7})),
        replace(MODEL, entry=MODEL.entry.model_copy(update={"mask": ["x"]})),
    ]
    assert len({key(), *(key(model) for model in changed)}) == len(changed) + 1


wishes = st.builds(
    Wish,
    wait_s=st.just(1.0),
    metadata=st.dictionaries(small, small, max_size=1),
    timeout_s=st.none() | st.sampled_from([1.0, 2.0]),
    webhook=st.none() | st.just({"url": "https://x/"}),
    result_ttl_s=st.none() | st.just(5),
)


@examples(100)
@given(st.tuples(calls, wishes), st.tuples(calls, wishes))
def test_one_idempotency_key_is_for_one_request(one: tuple[Call, Wish], other: tuple[Call, Wish]) -> None:
    def asked(call: Call, wish: Wish) -> str:
        seen = [meaning(call), call.model, call.stream, call.include_usage]
        return json.dumps([*seen, wish.metadata, wish.timeout_s, wish.webhook, wish.result_ttl_s])

    assert (fingerprints.request(*one) == fingerprints.request(*other)) == (asked(*one) == asked(*other))
    assert fingerprints.request(*one) == fingerprints.request(replace(one[0], token_ids=[]), one[1])
