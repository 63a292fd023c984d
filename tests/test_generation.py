"""What must hold of writing, for every shape of the model."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from llm_from_scratch.generation import (
    PackedWeight,
    Reader,
    _can_pack,
    beam_search,
    check_sampling,
    generate,
    generate_batch,
    next_token_probabilities,
    quicken,
    speculate,
    stream_text,
)
from llm_from_scratch.model import ModelConfig, TransformerLM, save_model

POSITIONS = ("rotary", "learned", "sinusoidal", "alibi", "none")
SHAPES = list(itertools.product(POSITIONS, (4, 2, 1)))
V, CONTEXT = 29, 24


def make(position, n_kv_heads=4, seed=0, scale=3.0, **more):
    torch.manual_seed(seed)
    model = TransformerLM(ModelConfig(
        vocab_size=V, context_length=CONTEXT, d_model=32, n_layers=2,
        n_heads=4, n_kv_heads=n_kv_heads, position=position,
        tie_embeddings=False, **more)).eval()
    with torch.no_grad():
        model.head.weight *= scale  # tokens differ in their chances
    return model


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s[0]}-{s[1]}kv")
def model(request):
    return make(*request.param)


def test_cache_changes_no_token(model):
    for settings in ({"temperature": 0}, {"seed": 1}):
        n = 3 * CONTEXT
        cached = list(generate(model, [1, 2], n, **settings))
        assert cached == list(
            generate(model, [1, 2], n, use_cache=False, **settings))


def test_batch_changes_no_token(model):
    prompts = [[1], [2, 3, 4, 5, 6], list(range(V))[:CONTEXT], [7, 8]]
    n = 2 * CONTEXT + 5
    alone = [list(generate(model, p, n, seed=s, stop_ids=[0]))
             for s, p in enumerate(prompts)]
    for rows in ([0, 1, 2, 3], [3, 0], [2, 1], [1, 1]):
        assert generate_batch(
            model, [prompts[i] for i in rows], n, rows, [0]
        ) == [alone[i] for i in rows]


SORTS = {  # other parts of the model, each with a linear layer or a norm
    "gpt2": {"position": "learned", "norm": "layernorm", "bias": True,
             "activation": "gelu"},
    "2017": {"position": "sinusoidal", "pre_norm": False,
             "activation": "relu", "bias": True},
    "qwen3": {"position": "rotary", "n_kv_heads": 2, "head_dim": 16,
              "qk_norm": True},
}


@pytest.fixture(params=[*SHAPES, *SORTS], ids=str)
def any_model(request):
    if not isinstance(request.param, str):
        return make(*request.param)
    model = make(**SORTS[request.param])
    for weight in model.parameters():
        if weight.dim() == 1:  # biases begin at zero, norms at one
            weight.data += torch.randn_like(weight)
    return model


@torch.inference_mode()
def test_packed_matrices_change_no_logits(any_model):
    quick, ids = quicken(any_model), torch.randint(V, (3, CONTEXT))
    assert not isinstance(quick.blocks[0].attention.qkv.weight, torch.Tensor)
    for padding in (None, torch.tensor([0, 5, 11])):
        caches = any_model.new_caches(3), quick.new_caches(3)
        for new in ids.split([12] + [1] * (CONTEXT - 12), dim=1):
            expected, ours = (
                m(new, c, padding, last=1)
                for m, c in zip((any_model, quick), caches, strict=True))
            torch.testing.assert_close(ours, expected)


def test_packed_matrices_change_no_token(any_model):
    quick, prompts = quicken(any_model), [[1, 2], [3], list(range(20))]
    n = 2 * CONTEXT
    for settings in ({"temperature": 0}, {"top_p": 0.9}):
        texts = [generate_batch(m, prompts, n, range(3), **settings)
                 for m in (any_model, quick)]
        assert texts[0] == texts[1] == [
            list(generate(quick, p, n, seed=s, **settings))
            for s, p in enumerate(prompts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [32, 33])
@torch.inference_mode()
def test_a_packed_weight_takes_arguments_by_place_and_by_name(D, dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(48, D).to(dtype), torch.randn(48).to(dtype)
    if not _can_pack(weight):
        pytest.skip("no such layout here")
    packed = PackedWeight(weight)
    for x in (torch.randn(1, D), torch.randn(2, 3, D)):
        x = x.to(dtype)
        plain, whole = F.linear(x, weight), F.linear(x, weight, bias)
        for ours, expected in (
                (F.linear(x, packed), plain),
                (F.linear(x, packed, None), plain),
                (F.linear(x, weight=packed), plain),
                (F.linear(x, packed, bias), whole),
                (F.linear(x, packed, bias=bias), whole),
                (F.linear(bias=bias, weight=packed, input=x), whole)):
            torch.testing.assert_close(ours, expected)
    with pytest.raises(TypeError):
        F.linear(x, packed, bias, 3)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_packing_leaves_the_model_as_it_was(is_tied, dtype):
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(
        vocab_size=V, context_length=CONTEXT, d_model=32, n_layers=2,
        n_heads=4, tie_embeddings=is_tied)).eval().to(dtype)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    ids = torch.randint(V, (2, CONTEXT))
    expected, quick = model(ids), quicken(model)
    torch.testing.assert_close(quick(ids), expected)
    if _can_pack(model.embedding.weight):
        for holder in (quick.head, quick.blocks[1].attention.out):
            assert isinstance(holder.weight, PackedWeight)
    assert quick.embedding.weight is model.embedding.weight
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(w, before[n])
               for n, w in model.state_dict().items())


def test_what_cannot_be_packed_stays_as_it_is():
    model = make("rotary").double()
    assert quicken(model) is model
    with pytest.raises(TypeError):
        torch.exp(quicken(make("rotary")).head.weight)


def test_batch_of_none_is_empty():
    assert generate_batch(make("rotary"), []) == []


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_beams_are_those_of_transformers(tmp_path, early, penalty):
    from transformers import AutoModelForCausalLM

    model = make("rotary", scale=6.0)
    twin = AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path))
    for ids, ends, n_beams in itertools.product(
            ([1], [5, 6, 7]), ([0], [0, 3, 9]), (2, 5)):
        out = twin.generate(
            torch.tensor([ids]), num_beams=n_beams, max_new_tokens=15,
            length_penalty=penalty, early_stopping=early, do_sample=False,
            num_return_sequences=n_beams, eos_token_id=ends, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True)
        ours = beam_search(model, ids, 15, n_beams, penalty, early, ends)
        assert len(ours) == n_beams
        for (score, text), row, expected in zip(
                ours, out.sequences[:, len(ids):].tolist(),
                out.sequences_scores.tolist(), strict=True):
            stops = [i for i, token in enumerate(row) if token in ends]
            assert text == (row[:stops[0]] if stops else row)
            assert abs(score - expected) < 1e-4


def test_enough_beams_find_the_best_text():
    model = make("rotary")
    with torch.no_grad():
        pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
        ids = torch.cat([torch.ones(V * V, 1, dtype=torch.long), pairs], 1)
        logp = model(ids).log_softmax(-1)[:, :2]
        total = logp.gather(2, pairs[:, :, None]).sum((1, 2))
    assert beam_search(model, [1], 2, V // 2)[0][1] == pairs[
        total.argmax()].tolist()


def test_counts_leave_the_prompt_alone():
    logits, seen = torch.zeros(V), torch.tensor([1, 1, 2, 3, 3])
    p = next_token_probabilities(
        logits, seen, presence_penalty=1.0, frequency_penalty=0.5, n_prompt=2)
    assert p[1] == p[0] > p[2] > p[3]
    torch.testing.assert_close((p[0] / p[3]).log(), torch.tensor(2.0))


def test_all_settings_together_still_give_a_distribution():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = 5 * torch.randn(V, generator=generator)
        seen = torch.randint(V, (20,), generator=generator)
        p = next_token_probabilities(
            logits, seen, 0.7, 20, 0.9, 1.3, min_p=0.05, typical_p=0.8,
            presence_penalty=0.3, frequency_penalty=0.1, no_repeat_ngram=2,
            n_prompt=5, allowed=range(0, V, 2))
        assert abs(p.sum() - 1) < 1e-5 and p[1::2].sum() == 0


def test_nothing_left_is_said():
    with pytest.raises(ValueError, match="no token is left"):
        next_token_probabilities(torch.zeros(V), torch.tensor([1]),
                                 allowed=[])


@pytest.mark.parametrize("settings", [
    {"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0},
    {"top_k": V + 1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1},
    {"typical_p": 0}, {"repetition_penalty": 0}, {"no_repeat_ngram": 0},
    {"presence_penalty": float("inf")}, {"max_new_tokens": 0}])
def test_impossible_settings_are_named_in_one_line(settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"^{name} is [^\n]*$"):
        check_sampling(**{"vocab_size": V, "max_new_tokens": 5, **settings})


@pytest.mark.parametrize("ids", [[], [V], [-1]])
def test_impossible_prompts_are_refused_at_once(ids):
    model = make("rotary")
    for write in (generate, beam_search, lambda m, i: generate_batch(m, [i])):
        with pytest.raises(ValueError, match="prompt"):
            write(model, ids)


class Letters:
    "A tokenizer whose ids are bytes."

    def decode_bytes(self, ids):
        return bytes(ids)


def test_stop_strings_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        draws = torch.randint(2, (12 + 3 * 3,), generator=generator).tolist()
        text = "".join("ab"[i] for i in draws[:12])
        stop = ["".join("ab"[i] for i in draws[12 + 3 * j:][:j + 1])
                for j in range(3)]
        ends = [(text.find(s) + len(s), text.find(s))
                for s in stop if s in text]
        expected = text[:min(ends)[1]] if ends else text
        pieces = list(stream_text(Letters(), text.encode(), stop))
        assert "".join(pieces) == expected and all(pieces)


def test_no_half_character_is_ever_printed():
    text = "naïve 東京 🙂!"
    pieces = list(stream_text(Letters(), text.encode(), ["xyz"]))
    assert pieces == list(text)


def test_a_stop_string_may_be_one_string():
    assert "".join(stream_text(Letters(), b"one two", " t")) == "one"
    with pytest.raises(ValueError, match="empty"):
        stream_text(Letters(), b"one", "")


def test_reader_needs_evaluation_mode():
    model = make("rotary", dropout=0.1).train()
    with pytest.raises(ValueError, match="eval"):
        Reader(model)


def test_a_draft_changes_no_greedy_text():
    model, draft = make("rotary"), make("learned", seed=1)
    whole = list(generate(model, [1, 2], 20, temperature=0))
    for draft_ in (draft, model):  # never right, always right
        for n in (1, 3, 30):
            for size in (1, 2, 20):
                assert list(speculate(
                    model, draft_, [1, 2], size, n, temperature=0)
                ) == whole[:size]


def test_a_draft_changes_no_distribution():
    """Pairs of tokens against their exact chances, by chi-square."""
    model, draft = make("rotary", scale=1.0), make("rotary", scale=0.1)
    settings = {"temperature": 0.9, "top_k": 6, "repetition_penalty": 1.3}

    @torch.no_grad()
    def exact(writer, ids):
        return next_token_probabilities(
            writer(torch.tensor([ids]))[0, -1], torch.tensor(ids), **settings)

    first = exact(model, [1])
    pairs = {(i, j): first[i] * p for i in first.nonzero()[:, 0].tolist()
             for j, p in enumerate(exact(model, [1, i])) if p > 0}
    n, far = 1500, (first - exact(draft, [1])).abs().sum()
    assert far > 0.2 and abs(sum(pairs.values()) - 1) < 1e-4
    counts = dict.fromkeys(pairs, 0)
    for seed in range(n):
        counts[tuple(speculate(model, draft, [1], 2, 3, seed, **settings))
               ] += 1
    score = sum((counts[k] - n * p) ** 2 / (n * p)
                for k, p in pairs.items() if n * p > 3)
    freedom = sum(n * p > 3 for p in pairs.values())
    assert score < freedom + 4 * (2 * freedom) ** 0.5, (score, freedom)


@pytest.mark.parametrize("bad", [
    {"n_guesses": 0}, {"max_new_tokens": CONTEXT}, {"temperature": -1}])
def test_impossible_speculation_is_refused(bad):
    model = make("rotary")
    with pytest.raises(ValueError, match="^[^\n]*$"):
        speculate(model, model, [1], **{"max_new_tokens": 5, **bad})
