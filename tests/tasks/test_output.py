"""Stop strings and masks over every way to cut a text into chunks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.base import Chunk
from tasks.output import Output, Piece

ALPHABET = "ab*"


def feed(output: Output, pieces: list[str]) -> list[Piece]:
    made = []
    for number, piece in enumerate(pieces):
        is_last = number + 1 == len(pieces)
        made.append(output.push(Chunk((number,), piece, "length" if is_last else None)))
        if made[-1].finish_reason is not None:
            break
    return made


@given(
    st.lists(st.text(ALPHABET, max_size=4), min_size=1, max_size=12),
    st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
)
def test_a_stop_string_is_found_however_the_text_is_cut(pieces: list[str], stop: list[str]) -> None:
    text = "".join(pieces)
    # A stop string ends the text where it first becomes whole; of those that end there, the earliest start counts.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    shown = "".join(piece.text for piece in feed(Output(stop, []), pieces))
    if not ends:
        assert shown == text
    else:
        assert shown in {text[:start] for _, start in ends}
        assert not any(s in shown for s in stop)


@given(st.lists(st.text("abc", max_size=4), min_size=1, max_size=12))
def test_a_masked_string_never_shows(pieces: list[str]) -> None:
    shown = "".join(piece.text for piece in feed(Output([], ["ab"]), pieces))
    assert shown == "".join(pieces).replace("ab", "***")


@given(st.lists(st.text(ALPHABET, max_size=3), min_size=2, max_size=10), st.data())
def test_an_attempt_that_takes_over_shows_the_same(pieces: list[str], data: st.DataObject) -> None:
    stop = ["aab", "b*a"]
    whole = feed(Output(stop, []), pieces)
    cut = data.draw(st.integers(0, len(whole) - 1))
    taken_over = Output(stop, [])
    for piece in whole[:cut]:
        taken_over.resume(piece)
    rest = [
        taken_over.push(Chunk((n,), pieces[n], "length" if n + 1 == len(pieces) else None))
        for n in range(cut, len(whole))
    ]
    assert "".join(p.text for p in whole) == "".join(p.text for p in [*whole[:cut], *rest])
    assert taken_over.token_ids == [token for p in whole for token in p.token_ids]
    assert rest[-1].finish_reason == whole[-1].finish_reason


@pytest.mark.parametrize(("stop", "expected"), [(["lo w"], "hel"), (["zz"], "hello world"), (["h"], "")])
def test_examples(stop: list[str], expected: str) -> None:
    output = Output(stop, [])
    feed(output, ["hel", "lo", " wor", "ld"])
    assert output.text == expected
    assert output.finish_reason == ("length" if expected == "hello world" else "stop")
