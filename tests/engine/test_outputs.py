"""Text as it comes: the same as at once, up to a stop string, with real tokenizers."""

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import save_bpe_tokenizer

from octavo.engine.checkpoint import open_checkpoint
from octavo.engine.hub import resolve
from octavo.engine.outputs import Completion, CompletionOutput, TextStream, Timings
from octavo.engine.sequence import TokenLogprobs
from octavo.engine.tokenizer import Tokenizer, TokenStream


@cache
def smollm2():
    return open_checkpoint(resolve("smollm2")).tokenizer()


@pytest.fixture(scope="module")
def bytes_and_few_words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    save_bpe_tokenizer(folder, 300)
    return Tokenizer.from_folder(folder)


def oracle(tokenizer, tokens, stop):
    """Text and stop string by looking, after each token, through all of the text that is complete by then."""
    stream, text = TokenStream(tokenizer), ""
    for token in [*tokens, None]:
        text += stream.flush() if token is None else stream.push(token)
        found = [(at, s) for s in stop if (at := text.find(s)) >= 0]
        if found:
            at, s = min(found)
            return text[:at], s
    return text, None


def streamed(tokenizer, tokens, stop, min_tokens=0):
    """The pieces that a stream hands out, and the stop string."""
    stream, pieces, found = TextStream(tokenizer, tuple(stop), min_tokens), [], None
    for token in tokens:
        piece, found = stream.push(token)
        pieces.append(piece)
        if found is not None:
            return pieces, found
    piece, found = stream.flush()
    return [*pieces, piece], found


TEXT = st.text(st.sampled_from("abc the sea\n😀é"), max_size=24)
STOP = st.lists(st.text(st.sampled_from("abc the\n😀é"), min_size=1, max_size=4), max_size=3)


@settings(max_examples=100)
@given(text=TEXT, stop=STOP)
@example(text="the sea 😀", stop=["😀"])
@example(text="aaab", stop=["aab"])
@example(text="abc", stop=["bcd", "c"])
@example(text="the the th", stop=["the x", "th\n"])
def test_text_ends_before_the_first_stop_string(text, stop):
    tokens = smollm2().encode(text)
    pieces, found = streamed(smollm2(), tokens, stop)
    assert ("".join(pieces), found) == oracle(smollm2(), tokens, stop)
    if not any(s in text for s in stop):
        assert "".join(pieces) == text and found is None


@settings(max_examples=100)
@given(text=TEXT, stop=STOP)
def test_characters_over_several_tokens(bytes_and_few_words, text, stop):
    tokens = bytes_and_few_words.encode(text)
    pieces, found = streamed(bytes_and_few_words, tokens, stop)
    assert ("".join(pieces), found) == oracle(bytes_and_few_words, tokens, stop)
    assert all("\ufffd" not in piece for piece in pieces)


def test_what_was_handed_out_is_never_taken_back():
    """Piece by piece: nothing that could begin a stop string is there before it is known not to."""
    tokens = smollm2().encode("one two three")
    stream = TextStream(smollm2(), (" two four",))
    pieces = [stream.push(token)[0] for token in tokens]
    assert pieces == ["one", "", " two three"]
    assert stream.flush() == ("", None)
    stream = TextStream(smollm2(), (" two four",))
    assert [stream.push(token)[0] for token in tokens[:2]] == ["one", ""] and stream.flush() == (" two", None)


def test_before_min_tokens_a_stop_string_is_text():
    tokens = smollm2().encode("a b a b a b")
    assert len(tokens) == 6
    assert streamed(smollm2(), tokens, [" b"])[0][:2] == ["a", ""]
    pieces, found = streamed(smollm2(), tokens, [" b"], min_tokens=3)
    assert "".join(pieces) == "a b a" and found == " b"
    pieces, found = streamed(smollm2(), tokens, [" b a"], min_tokens=3)
    assert "".join(pieces) == "a" and found == " b a", "one that ends with the third token may begin before it"


def test_a_completion_is_its_first_continuation():
    first = CompletionOutput(
        0, "text", [5, 6], "stop", logprobs=[TokenLogprobs(5, -1.0, []), TokenLogprobs(6, -0.5, [])]
    )
    done = Completion([1], [first, CompletionOutput(1, error="broken", finish_reason="error")], Timings(2.0))
    assert (done.text, done.token_ids, done.finish_reason, done.logprobs) == ("text", [5, 6], "stop", first.logprobs)
    assert first.cumulative_logprob == -1.5 and done.outputs[1].cumulative_logprob is None
    assert done.finished and done.error == "broken"
    assert done.timings.time_to_first_token is None and done.timings.latency is None
