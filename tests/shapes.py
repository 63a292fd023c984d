"""Shapes that several tests build models of."""

from llm_from_scratch.model import preset

V = 300  # entries of the vocabulary
_SMALL = dict(vocab_size=V, d_model=64, n_layers=2, n_heads=4)
SHAPES = {
    "gpt2": preset("gpt2-124m", context_length=64, dropout=0.0, **_SMALL),
    "qwen3": preset(
        "qwen3-0.6b",
        n_kv_heads=2,
        head_dim=32,
        d_ff=172,
        context_length=64,
        **_SMALL,
    ),
}
