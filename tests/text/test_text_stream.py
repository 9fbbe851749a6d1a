"""TextStream against the naive way: decode everything, then cut at the first stop string."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_ext.text.text_stream import TextStream
from mistral_ext.text.tokenizer import UTF8_ERRORS, Tokenizer

mistral_common = pytest.importorskip("mistral_common")

DATA = Path(mistral_common.__file__).parent / "data"


@pytest.fixture(scope="module", params=["v1", "v3"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    source = next(DATA.glob(f"*.model.{request.param}"))
    shutil.copy(source, folder / "tokenizer.model")
    return Tokenizer.from_folder(folder)


class Chunks:
    """Stands for a Tokenizer whose token i is the i-th of some chunks of bytes."""

    adds_first_space = True

    def __init__(self, chunks: list[bytes]) -> None:
        self.token_bytes = chunks.__getitem__


def cut_at_stop(text: str, stop: list[str]) -> str:
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


def run(stream: TextStream, ids) -> str:
    """Push all ids and finish; the joined pieces must be .text at every step."""
    pieces = []
    for token_id in ids:
        pieces.append(stream.push(token_id))
        assert "".join(pieces) == stream.text
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return stream.text


# Few different characters, so that stop strings occur, overlap and begin inside each other.
crowded_text = st.text(alphabet="ab é😀", max_size=24)
crowded_stops = st.lists(st.text(alphabet="ab é😀", min_size=1, max_size=5), max_size=3)


@st.composite
def chunked(draw, texts):
    """Chunks of a text's bytes, cut anywhere: inside characters too, some empty."""
    data = draw(texts).encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=30)))
    return [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@given(chunks=chunked(crowded_text), stop=crowded_stops, strip=st.booleans())
@settings(max_examples=600, deadline=None)
def test_any_chunks_any_stops(chunks, stop, strip):
    stream = TextStream(Chunks(chunks), stop, strip_first_space=strip)
    whole = b"".join(chunks).decode()
    if strip:
        whole = whole.removeprefix(" ")
    assert run(stream, range(len(chunks))) == cut_at_stop(whole, stop)
    assert stream.stopped == any(s in whole for s in stop)


@given(chunks=chunked(crowded_text), stop=crowded_stops)
@settings(max_examples=300, deadline=None)
def test_holds_back_only_what_may_become_a_stop_string(chunks, stop):
    stream = TextStream(Chunks(chunks), stop)
    data = b""
    for i, chunk in enumerate(chunks):
        stream.push(i)
        data += chunk
        if stream.stopped:
            break
        held = data.decode(errors="ignore")[len(stream.text) :]  # but for an incomplete character
        assert held == "" or any(s.startswith(held) for s in stop)


@given(chunks=st.lists(st.binary(max_size=5), max_size=12))
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_not_utf8(chunks):
    stream = TextStream(Chunks(chunks))
    assert run(stream, range(len(chunks))) == b"".join(chunks).decode("utf-8", UTF8_ERRORS)


@given(text=st.text(max_size=60), stop=st.lists(st.text(min_size=1, max_size=2), max_size=2))
@settings(max_examples=200, deadline=None)
def test_real_tokens(text, stop, tokenizer):
    ids = tokenizer.encode(text)
    for strip in (True, False):
        whole = tokenizer.decode(ids, strip_first_space=strip)
        assert run(TextStream(tokenizer, stop, strip), ids) == cut_at_stop(whole, stop)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_ids(data, tokenizer):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    for strip in (True, False):
        assert run(TextStream(tokenizer, (), strip), ids) == tokenizer.decode(ids, strip)


def test_continuation_keeps_its_space(tokenizer):
    prompt = tokenizer.encode("Once upon a time")
    reply = tokenizer.encode("there was", bos=False)
    assert run(TextStream(tokenizer), reply) == " there was"
    assert tokenizer.decode(prompt + reply) == "Once upon a time there was"
    assert run(TextStream(tokenizer, strip_first_space=True), reply) == "there was"


def test_strips_one_space_of_the_first_text_only(tokenizer):
    ids = tokenizer.encode("  a", bos=True) + tokenizer.encode("b", bos=False)
    assert run(TextStream(tokenizer, strip_first_space=True), ids) == "  a b"


def test_emoji_appears_whole(tokenizer):
    ids = tokenizer.encode("🫠!", bos=False)
    assert len(ids) == 6  # "▁", four bytes, "!"
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids] == [" ", "", "", "", "🫠", "!"]
    assert stream.finish() == ""


def test_incomplete_character_at_the_end(tokenizer):
    stream = TextStream(tokenizer, strip_first_space=True)
    ids = tokenizer.encode("x🫠", bos=False)[:-1]
    assert [stream.push(i) for i in ids] == ["x", "", "", ""]
    assert stream.finish() == "\ufffd" * 3  # a byte each, as SentencePiece decodes it
    assert stream.text == tokenizer.decode(ids)


def test_stop_string_across_tokens():
    stream = TextStream(Chunks([b"ab \n", b"\nEN", b"D", b" more", b"x"]), stop=["\n\nEND"])
    assert [stream.push(0), stream.push(1)] == ["ab ", ""]
    assert not stream.stopped
    assert stream.push(2) == ""
    assert stream.stopped
    assert [stream.push(3), stream.push(4), stream.finish()] == ["", "", ""]
    assert stream.text == "ab "


def test_stop_string_that_does_not_come_true():
    stream = TextStream(Chunks([b"a--", b"-b-", b"-"]), stop=["---->", "--c"])
    assert [stream.push(0), stream.push(1), stream.push(2)] == ["a", "---b", ""]
    assert stream.finish() == "--"
    assert not stream.stopped


def test_stop_string_inside_a_longer_one():
    """ "c" is complete first, but "abcd" begins first: wait until that is decided."""
    stream = TextStream(Chunks([b"xabc", b"d"]), stop=["abcd", "c"])
    assert stream.push(0) == "x"
    assert not stream.stopped
    assert stream.push(1) == ""
    assert (stream.stopped, stream.text) == (True, "x")

    stream = TextStream(Chunks([b"xabc", b"e"]), stop=["abcd", "c"])
    assert [stream.push(0), stream.push(1)] == ["x", "ab"]
    assert stream.stopped

    stream = TextStream(Chunks([b"xabc"]), stop=["abcd", "c"])
    assert [stream.push(0), stream.finish()] == ["x", "ab"]
    assert stream.stopped


def test_stop_string_of_stripped_space():
    """A space that is not part of the text cannot stop it."""
    stream = TextStream(Chunks([b" Hi", b" you"]), stop=[" "], strip_first_space=True)
    assert [stream.push(0), stream.push(1)] == ["Hi", ""]
    assert stream.stopped


def test_bad_arguments(tokenizer):
    with pytest.raises(TypeError, match=r"stop is the string '.*', expected a sequence"):
        TextStream(tokenizer, stop="END")
    with pytest.raises(ValueError, match=r"stop is \[.*\], expected non-empty strings"):
        TextStream(tokenizer, stop=["END", ""])
    with pytest.raises(ValueError, match="token id is 99999"):
        TextStream(tokenizer).push(99999)


def test_nothing_is_held_back_across_the_divider():
    chunks = [b"a\xf0\x9f", b"b STO", b"", b"P STOP"]
    stream = TextStream(Chunks(chunks), ["STOP"], divider=2)
    assert [stream.push(i) for i in range(4)] == ["a", "\ufffd\ufffdb ", "STO", "P "]
    assert stream.stopped
    stream = TextStream(Chunks([b"a\xf0\x9f", b"", b"\x98\x80"]), divider=1)
    assert run(stream, range(3)) == "a" + "\ufffd" * 4
