"""Chapter 2, by properties: any ids, any windows, any documents."""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import DataLoader

from llm_from_scratch.data import (
    Document,
    Packed,
    Windows,
    band_probability,
    clean_text,
    encode_documents,
    find_copies,
    load_documents,
    match_sketches,
    minhash,
    open_tokens,
    pack,
    read_folder,
    shared_runs,
    shingles,
    split_documents,
    stream_dataset,
    write_tokens,
)
from llm_from_scratch.tokenizer import END_OF_TEXT, Tokenizer

many = settings(max_examples=150)
few = settings(max_examples=40)
seeds = st.integers(0, 2**31)


@st.composite
def shards(draw):
    "Any ids in any blocks, and a size of vocabulary that has room for them."
    vocab_size = draw(
        st.sampled_from([1, 256, 65_535, 65_536, 65_537, 200_019, 2**32])
    )
    block = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=40)
    return vocab_size, draw(st.lists(block, max_size=5))


@st.composite
def samplers(draw):
    "Windows over their own positions."
    length = draw(st.integers(1, 12))
    n_tokens = draw(st.integers(2 * length, 200))
    return Windows(np.arange(n_tokens), length, 1, seed=draw(seeds))


documents = st.lists(
    st.lists(st.integers(0, 99), min_size=1, max_size=19), min_size=1
)


# ids on disk


@many
@given(shards())
def test_a_shard_holds_any_ids(tmp_path_factory, shard):
    vocab_size, blocks = shard
    path = tmp_path_factory.getbasetemp() / "any.tokens"
    parts = (np.array(block, np.int64) for block in blocks)
    write_tokens(path, parts, vocab_size)
    ids = open_tokens(path)
    assert ids.dtype == ("<u2" if vocab_size <= 65_536 else "<u4")
    assert ids.tolist() == sum(blocks, [])
    if blocks:
        before = path.read_bytes()
        line = np.concatenate([np.array(b, np.int64) for b in blocks])
        assert write_tokens(path, line, vocab_size).read_bytes() == before


@many
@given(shards(), st.integers(-3, 3), seeds)
def test_an_id_outside_the_vocabulary_is_refused(
    tmp_path_factory, shard, shift, seed
):
    vocab_size, blocks = shard
    wrong = shift if shift < 0 else vocab_size + shift
    ids = np.array(sum(blocks, []) + [wrong], np.int64)
    np.random.default_rng(seed).shuffle(ids)
    path = tmp_path_factory.getbasetemp() / "refused.tokens"
    with pytest.raises(ValueError, match=f"vocab_size {vocab_size}"):
        write_tokens(path, ids, vocab_size)
    assert not path.exists()


def write_shard(tmp_path_factory, shard, name):
    "The path of a token file, and its ids."
    vocab_size, blocks = shard
    path = tmp_path_factory.getbasetemp() / name
    write_tokens(path, (np.array(block) for block in blocks), vocab_size)
    return path, sum(blocks, [])


@many
@given(shards(), st.data())
def test_a_flipped_bit_is_refused_or_harmless(tmp_path_factory, shard, data):
    path, ids = write_shard(tmp_path_factory, shard, "flipped.tokens")
    raw = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        assert open_tokens(path).tolist() == ids
        assert place < 256  # space in the header, or a field that is not used
    except ValueError as error:
        assert str(path) in str(error)


@many
@given(shards(), st.data())
def test_a_cut_or_longer_shard_is_refused(tmp_path_factory, shard, data):
    path, _ = write_shard(tmp_path_factory, shard, "cut.tokens")
    raw = path.read_bytes()
    size = data.draw(st.integers(0, len(raw) - 1))
    for broken in (raw[:size], raw + raw[: size + 1]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"cut\.tokens"):
            open_tokens(path)


@given(st.binary(max_size=600))
def test_a_foreign_file_is_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "foreign.tokens"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"foreign\.tokens"):
        open_tokens(path)


def test_a_map_travels_as_a_path_and_a_part_as_ids(tmp_path):
    ids = np.arange(100_000) % 1000
    path = write_tokens(tmp_path / "ids.tokens", ids, 1000)
    mapped = open_tokens(path)
    packet = pickle.dumps(Windows(mapped, 16, 4))
    assert len(packet) < 1000
    again = pickle.loads(packet)
    assert (again.tokens == ids).all()
    assert (pickle.loads(pickle.dumps(mapped[5:50])) == ids[5:50]).all()
    assert (pickle.loads(pickle.dumps(mapped + 1)) == ids + 1).all()
    whole = mapped[:]
    assert (pickle.loads(pickle.dumps(whole)) == ids).all()


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="counts pages as Linux does"
)
def test_memory_stays_flat_while_a_large_shard_is_read(tmp_path):
    "In a process of its own: 128 MiB of tokens, 16 MiB of memory at most."
    script = """
    import os
    import sys

    import numpy as np

    from llm_from_scratch.data import Windows, open_tokens, write_tokens

    def own():
        _, resident, shared, *_ = open("/proc/self/statm").read().split()
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")

    block = np.random.default_rng(0).integers(0, 1024, 1 << 20)
    path = write_tokens(sys.argv[1], (block for _ in range(64)), 1024)
    before, most = own(), 0
    windows = Windows(open_tokens(path), 1024, 64)
    for step in range(windows.n_windows // 64):
        windows.batch(step)
        most = max(most, own())
    print(path.stat().st_size, most - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path / "big"],
        text=True,
        capture_output=True,
        check=True,
    )
    size, grown = map(int, done.stdout.split())
    assert size > 128 * 2**20 and grown < 16 * 2**20, grown


# windows


@many
@given(samplers(), st.integers(0, 50))
def test_an_epoch_covers_what_it_says(windows, epoch):
    n, T = windows.n_windows, windows.context_length
    N = len(windows.tokens)
    targets = []
    for step in range(epoch * n, (epoch + 1) * n):
        inputs, y = windows.batch(step)
        assert inputs.shape == y.shape == (1, T)
        assert inputs[0].tolist() == list(range(inputs[0, 0], y[0, -1]))
        assert torch.equal(y, inputs + 1)
        targets += y[0].tolist()
    assert sorted(targets) == list(range(min(targets), min(targets) + n * T))
    assert N - len(targets) == T + N % T < 2 * T
    assert min(targets) > 0 and max(targets) < N - N % T


@many
@given(samplers(), st.integers(1, 9), st.integers(0, 300), st.data())
def test_resume_at_any_step_is_the_uninterrupted_order(
    windows, size, step, data
):
    "Nothing that was asked before, nor the size of a batch, changes it."
    args = windows.tokens, windows.context_length
    whole = Windows(*args, size, windows.seed)
    for n in data.draw(st.lists(st.integers(0, 300), max_size=5)):
        whole.batch(n)
    fresh = Windows(*args, size, windows.seed)
    alone = [windows.batch(step * size + i) for i in range(size)]
    for part, again, rows in zip(
        whole.batch(step), fresh.batch(step), zip(*alone)
    ):
        assert torch.equal(part, again)
        assert torch.equal(part, torch.cat(rows))


@few
@given(st.integers(1, 12), st.data())
def test_too_few_tokens_are_refused_with_both_numbers(length, data):
    n = data.draw(st.integers(0, 2 * length - 1))
    with pytest.raises(ValueError, match=f"{n} tokens.* {2 * length} are"):
        Windows(np.arange(n), length, 1)


@pytest.mark.parametrize("context", ["spawn", None])
def test_workers_draw_what_one_process_draws(tmp_path, context):
    "Any number of workers, started in the middle of an epoch."
    ids = np.random.default_rng(0).integers(0, 500, 3000)
    path = write_tokens(tmp_path / "ids.tokens", ids, 500)
    windows = Windows(open_tokens(path), 16, 4, seed=5)
    documents = [row.tolist() for row in ids.reshape(-1, 6)]
    packed = Packed(documents, 500, 16, 4, seed=5)
    steps = range(61, 130)  # 46.5 batches make an epoch
    for n_workers in [2] if context else [1, 2]:
        for sampler in (windows, packed):
            loader = DataLoader(
                steps,
                batch_size=None,
                collate_fn=sampler.batch,
                num_workers=n_workers,
                multiprocessing_context=context,
            )
            for step, batch in zip(steps, loader, strict=True):
                for part, ours in zip(batch, sampler.batch(step), strict=True):
                    assert torch.equal(part, ours)


# short documents


@many
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 50))
def test_packing_loses_nothing_and_wastes_little(lengths, size):
    rows = pack(lengths, size)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    full = sorted(sum(lengths[i] for i in row) for row in rows)
    assert not full or full[-1] <= size
    assert len(full) < 2 or full[0] + full[1] > size  # else one row would do


@many
@given(documents, st.integers(1, 4), seeds, st.integers(0, 5))
def test_packed_rows_hold_every_document_once(documents, size, seed, epoch):
    packed = Packed(documents, 100, 20, size, seed)
    n = len(packed.inputs)
    alone = Packed(documents, 100, 20, 1, seed)
    seen = []
    for number in range(epoch * n, (epoch + 1) * n):
        inputs, targets, numbers = (part[0] for part in alone.batch(number))
        for i in sorted(set(numbers.tolist()) - {-1}):
            here = numbers == i
            seen.append(i)
            assert inputs[here].tolist() == [100, *documents[i]]
            assert targets[here].tolist() == [*documents[i], 100]
            places = here.nonzero().flatten()
            assert len(places) == places[-1] - places[0] + 1
        assert (targets[numbers < 0] == -100).all()
    assert sorted(seen) == list(range(len(documents)))
    rows = [alone.batch(epoch * size + i) for i in range(size)]
    for part, single in zip(packed.batch(epoch), zip(*rows)):
        assert torch.equal(part, torch.cat(single))


# text


@many
@given(st.lists(st.text(min_size=1), min_size=1, max_size=8))
def test_a_jsonl_file_holds_any_texts(tmp_path_factory, texts):
    assume(any(text.strip() for text in texts))
    folder = tmp_path_factory.getbasetemp() / "jsonl"
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"text": t}, ensure_ascii=i % 2 == 0)
        for i, t in enumerate(texts)
    ]
    with open(folder / "a.jsonl", "w", encoding="utf-8", newline="") as file:
        file.write("\n".join(lines))
    assert read_folder(folder) == [
        Document(f"a.jsonl:{i}", text)
        for i, text in enumerate(texts, 1)
        if text.strip()
    ]


@settings(max_examples=500)
@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert "\n\n\n" not in once and " \n" not in once


# copies


hashes = hnp.arrays(
    np.uint64,
    st.integers(1, 30),
    elements=st.integers(0, 2**32 - 1),
    unique=True,
)


@many
@given(hashes, hashes, seeds)
def test_the_sketch_of_a_union_is_the_smaller_of_both(a, b, seed):
    union = minhash(np.union1d(a, b), 40, seed)
    assert (
        union == np.minimum(minhash(a, 40, seed), minhash(b, 40, seed))
    ).all()
    assert (minhash(a[::-1], 40, seed) == minhash(a, 40, seed)).all()


@many
@given(
    st.floats(0, 1), st.floats(0, 1), st.integers(1, 40), st.integers(1, 20)
)
def test_the_more_alike_the_likelier_to_meet(a, b, bands, rows):
    low, high = sorted((a, b))
    p, q = (band_probability(s, bands, rows) for s in (low, high))
    assert 0 <= p <= q + 1e-12 <= 1 + 1e-9
    assert band_probability(high, bands + 1, rows) >= q - 1e-12


@few
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40), seeds)
def test_equal_texts_are_found_whatever_their_case(words, seed):
    text = " ".join(words)
    other = Document("other", "something else that shares not a single run")
    copy = Document("copy", text.upper().replace(" ", ",  "))
    found = find_copies([Document("first", text), other, copy])
    assert found == {2: 0}
    assert (shingles(text) == shingles(copy.text)).all()


# the split


@many
@given(
    st.lists(
        st.text("ab \n", min_size=1, max_size=50), min_size=1, max_size=20
    ),
    st.floats(0.01, 0.99),
    seeds,
)
def test_a_split_loses_nothing_and_shares_nothing(texts, fraction, seed):
    whole = [Document(str(i), text) for i, text in enumerate(texts)]
    train, valid = split_documents(whole, fraction, seed)
    assert split_documents(whole, fraction, seed) == (train, valid)
    if len(whole) == 1:
        assert train[0].text + valid[0].text == texts[0]
    else:
        assert train and valid
        names = [d.name for d in train + valid]
        assert sorted(names) == sorted(d.name for d in whole)
        assert len(set(names)) == len(names)


@many
@given(st.text("ab "), st.text("ab "), st.integers(1, 4))
def test_shared_runs_are_counted_as_by_hand(train, valid, n):
    def runs(text):
        words = text.split()
        return [words[i : i + n] for i in range(len(words) - n + 1)]

    hits = [run in runs(train) for run in runs(valid)]
    share = sum(hits) / len(hits) if hits else 0
    assert (
        shared_runs([Document("t", train)], [Document("v", valid)], n) == share
    )


# data sets of the Hugging Face Hub, from folders laid out as it lays them out


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "A data set in Parquet files, one of JSON lines, and one that is damaged."
    pytest.importorskip("datasets")
    import pyarrow as pa
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("hub")
    for name in ("tales", "lines", "damaged"):
        (root / name / "data").mkdir(parents=True)
    for name, texts in {
        "train-00000-of-00002": ["The king speaks.", " ", "The fool sleeps."],
        "train-00001-of-00002": ["The queen speaks."],
        "validation-00000-of-00001": ["Nobody speaks."],
    }.items():
        rows = pa.table({"text": texts, "length": [len(t) for t in texts]})
        parquet.write_table(rows, root / "tales/data" / f"{name}.parquet")
    for split in ("train", "test"):
        (root / "lines" / f"{split}.jsonl").write_text(
            "".join(f'{{"story": "{split} {i}"}}\n' for i in range(3))
        )
    first = root / "tales/data/train-00000-of-00002.parquet"
    (root / "damaged/data/train-00000-of-00002.parquet").write_bytes(
        first.read_bytes()
    )
    (root / "damaged/data/train-00001-of-00002.parquet").write_bytes(b"PAR1")
    (root / "empty").mkdir()
    return root


def test_a_data_set_is_streamed_from_parquet_and_json(hub):
    tales = str(hub / "tales")
    expected = [
        Document("train:0", "The king speaks."),
        Document("train:2", "The fool sleeps."),
        Document("train:3", "The queen speaks."),
    ]
    assert list(stream_dataset(tales)) == expected
    assert load_documents(f"hf:{tales}") == expected
    held = list(stream_dataset(tales, "validation"))
    assert held == [Document("validation:0", "Nobody speaks.")]
    lines = stream_dataset(str(hub / "lines"), "test", field="story")
    assert [d.text for d in lines] == ["test 0", "test 1", "test 2"]


def test_a_stream_reads_no_further_than_it_must(hub):
    documents = stream_dataset(str(hub / "damaged"))
    assert next(documents).text == "The king speaks."
    assert next(documents).text == "The fool sleeps."
    with pytest.raises(ValueError, match="damaged'"):
        next(documents)


def test_a_stream_goes_to_disk_and_into_windows(hub, tmp_path):
    documents = list(stream_dataset(str(hub / "tales")))
    tokenizer = Tokenizer.train([d.text for d in documents], 270)
    parts = (
        encode_documents([d], tokenizer)
        for d in stream_dataset(str(hub / "tales"))
    )
    path = tmp_path / "tales.tokens"
    write_tokens(path, parts, tokenizer.vocab_size, tokenizer)
    ids = open_tokens(path, tokenizer=tokenizer)
    text = tokenizer.decode(ids.tolist())
    assert text == "".join(d.text + END_OF_TEXT for d in documents)
    assert Windows(ids, 8, 2).batch(0)[0].shape == (2, 8)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tales", {"split": "test"}, "test.*train.*validation"),
        ("tales", {"field": "story"}, "row 0.*'story'.*text, length"),
        ("tales", {"field": "length"}, "row 0.*'length'"),
        ("tales", {"config": "other"}, "other"),
        ("empty", {}, "any data files"),
        ("gone", {}, "gone"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(hub, name, options, words):
    with pytest.raises(ValueError, match=words) as refusal:
        list(stream_dataset(str(hub / name), **options))
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


def test_without_a_network_a_name_is_refused_at_once(hub):
    script = """
    from llm_from_scratch.data import load_documents
    try:
        load_documents("hf:somebody/something")
    except ValueError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        text=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
    )
    assert done.stdout.count("\n") == 1
    assert "somebody/something" in done.stdout and "Hub" in done.stdout


def test_sketches_made_by_workers_find_the_same_copies(hub):
    from datasets import Dataset

    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), 40)) for _ in range(30)]
    texts += [text.upper() for text in texts[:5]] + [texts[7] + " a"]
    rows = Dataset.from_dict({"text": texts})
    rows = rows.map(
        lambda row: {"sketch": minhash(shingles(row["text"]))}, num_proc=2
    )
    copies = match_sketches(rows["sketch"])
    assert copies == find_copies(Document("", text) for text in texts)
    assert copies == {30: 0, 31: 1, 32: 2, 33: 3, 34: 4, 35: 7}
