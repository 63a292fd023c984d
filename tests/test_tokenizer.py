"""What must hold for any text, any vocabulary and any file."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_from_scratch.data import load_documents
from llm_from_scratch.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    PATTERNS,
    Tokenizer,
    count_words,
    learn_merges,
    merge_by_rank,
    read_pieces,
    split_words,
)

# The signs that the pattern treats alike, and all of Unicode. Only what has
# been assigned: for a code point that is new, tables of letters differ.
WRITTEN = st.characters(exclude_categories=["Cs", "Cn"], max_codepoint=0x2FFF)
SIGNS = [*"aZ09.'_ \n\t\r\x1c\u00a0é—", "'ll", "  ", "\r\n", "the"]
TEXT = st.text(WRITTEN) | st.lists(st.sampled_from(SIGNS)).map("".join)


@cache
def play():
    return load_documents("shakespeare")[0].text


@cache
def ours(name="gpt2", vocab_size=900):
    return Tokenizer.train([play()], vocab_size, pattern=PATTERNS[name])


@cache
def openai():
    ranks = {token: i for i, token in enumerate(ours().tokens[:-1])}
    return tiktoken.Encoding(
        "ours", pat_str=GPT2_PATTERN, special_tokens={}, mergeable_ranks=ranks
    )


@given(TEXT, st.sampled_from(sorted(PATTERNS)))
def test_decode_undoes_encode(text, name):
    assert ours(name).decode(ours(name).encode(text)) == text


@given(st.binary())
def test_any_bytes_survive(data):
    # bytes that are no text reach a tokenizer as Latin-1
    text = data.decode("latin-1")
    assert ours().decode(ours().encode(text)).encode("latin-1") == data


@settings(max_examples=300)
@given(TEXT)
def test_ids_equal_tiktoken(text):
    assert ours().encode(text) == openai().encode_ordinary(text)


@given(st.lists(TEXT, max_size=5))
def test_what_came_before_changes_nothing(texts):
    fresh = Tokenizer(ours().merges)
    for text in texts:
        assert fresh.encode(text) == ours().encode(text)


@given(
    st.dictionaries(st.text("aab", min_size=1), st.integers(1, 9)),
    st.text("ab"),
)
def test_words_together_equal_words_alone(counts, word):
    tokenizer = Tokenizer(learn_merges(counts, 30), ())
    ranks = {pair: i for i, pair in enumerate(tokenizer.merges, 256)}
    first = {token: i for i, token in enumerate(tokenizer.tokens[:256])}
    ids = [first[c.encode()] for c in word]
    assert tokenizer.encode(word) == list(merge_by_rank(ids, ranks))


@given(TEXT, st.integers(1, 40))
def test_pieces_of_a_file_keep_its_words(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("pieces") / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    pieces = list(read_pieces(path, size))
    assert "".join(pieces) == text
    assert [w for p in pieces for w in split_words(p)] == split_words(text)


def test_processes_change_nothing():
    texts = [d.text for d in load_documents("shakespeare")][:6]
    assert count_words(iter(texts), processes=2) == count_words(texts)
    two = Tokenizer.train(texts, 400, processes=2)
    assert two.merges == Tokenizer.train(texts, 400).merges


def test_threads_and_copies_share_nothing():
    tokenizer = Tokenizer(ours().merges)
    lines = play().splitlines()[:2000]
    expected = [ours().encode(line) for line in lines]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, lines)) == expected
    for other in (copy.deepcopy(tokenizer), pickle.loads(
            pickle.dumps(tokenizer))):
        assert other.encode(lines[5]) == expected[5]
        assert other.vocab_size == tokenizer.vocab_size


def test_an_error_leaves_the_tokenizer_whole():
    tokenizer = Tokenizer(ours().merges)
    for _ in range(2):
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode("a new word \ud800 and another")
        assert tokenizer.encode("another new word") == ours().encode(
            "another new word")


def test_memory_of_words_is_bounded():
    tokenizer = Tokenizer([], ())
    for start in range(0, 2**19, 2**17):
        tokenizer.encode(" ".join(map(str, range(start, start + 2**17))))
        assert len(tokenizer._words) <= 2**18 + 2**17
    tokenizer.encode("x" * 100_000)
    assert max(map(len, tokenizer._words), default=0) <= 64
    assert tokenizer.encode("hi") == [71, 72]


def test_a_batch_is_its_texts():
    texts = ["", *play().splitlines()[:999], play(), "", "naïve"]
    batch = Tokenizer(ours().merges).encode_batch(iter(texts))
    assert batch == [ours().encode(text) for text in texts]
    assert ours().encode_batch([]) == []


def test_texts_may_come_from_the_tokenizer_itself():
    tokenizer = Tokenizer(ours().merges)
    lines = play().splitlines()[:300]
    copies = (tokenizer.decode(tokenizer.encode(line)) for line in lines)
    assert tokenizer.encode_batch(copies) == [
        ours().encode(line) for line in lines]


@pytest.mark.parametrize("pattern", ["(a)|.", "[", r"\w+"])
def test_bad_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="pattern") as error:
        Tokenizer.train(["a text!"], 300, pattern=pattern)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_files_keep_the_pattern(name, tmp_path):
    from tokenizers import Tokenizer as Peer

    path = ours(name).save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(path)
    assert again.pattern == PATTERNS[name]
    text = "DON'T  stop, it's 12345 o'clock\n\n  noW..\n/x"
    assert again.encode(text) == ours(name).encode(text)
    peer = Peer.from_file(str(path))
    assert peer.encode(text + play()).ids == again.encode(text + play())
    assert peer.encode(END_OF_TEXT).ids == again.encode(END_OF_TEXT, "all")
