"""Other people's libraries open what we write, and agree with it."""

import torch

from llm_from_scratch.data import load_documents
from llm_from_scratch.model import load_model
from llm_from_scratch.tokenizer import Tokenizer

TEXTS = [
    "the king speaks 3.",
    " No, no!\n\n\tTab",
    "naïve café 東京 🙂",
    "",
    "<|endoftext|> is only text here",
    "don't we'll I've",
]


def test_transformers_gives_the_same_logits(run):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(run).eval()
    ours = load_model(run)
    ids = torch.randint(ours.config.vocab_size, (3, 64))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_transformers_gives_the_same_ids(run):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(run)
    ours = Tokenizer.load(run / "tokenizer.json")
    for text in TEXTS[:4] + TEXTS[5:]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text
    end = ours.special_tokens["<|endoftext|>"]
    assert theirs.eos_token_id == end
    assert end not in ours.encode(TEXTS[4])


def test_greedy_text_is_the_same(run):
    from transformers import AutoModelForCausalLM

    from llm_from_scratch.generation import generate

    theirs = AutoModelForCausalLM.from_pretrained(run).eval()
    ours = load_model(run)
    prompt = [5, 6, 7, 8]
    expected = theirs.generate(
        torch.tensor([prompt]),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 4:].tolist()
    assert list(generate(ours, prompt, 40, temperature=0)) == expected


def test_tokenizer_agrees_on_whole_plays():
    from tokenizers import Tokenizer as Peer

    play = load_documents("shakespeare")[0].text
    ours = Tokenizer.train([play], 700)
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = ours.save(f"{folder}/tokenizer.json")
        assert Peer.from_file(str(path)).encode(play).ids == ours.encode(play)
