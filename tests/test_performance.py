"""Counting, timing, watching: what a page of the book does not show."""

import gc
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_from_scratch import performance as module
from llm_from_scratch.model import ModelConfig, flops_per_token, training_bytes
from llm_from_scratch.performance import (
    DEVICES,
    PRECISIONS,
    MemoryTimeline,
    TrainingStep,
    amdahl,
    attainable,
    benchmark,
    blocked_attention,
    check_device,
    count_work,
    find_device,
    matmul_route,
    memory_timeline,
    mfu,
    report_rows,
    time_by_kind,
    time_calls,
    trace,
)

KINDS = [
    {},
    dict(position="learned", norm="layernorm", activation="gelu", bias=True),
    dict(n_kv_heads=2, qk_norm=True),
    dict(tie_embeddings=False, head_dim=12),
]


def tiny(**changes):
    sizes = dict(vocab_size=50, context_length=16, d_model=32, n_layers=2)
    return ModelConfig(**{**sizes, "n_heads": 4, **changes})


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_step_does_what_the_formula_says(kind):
    config = tiny(**kind)
    step = TrainingStep(config, batch_size=3)
    with sdpa_kernel(SDPBackend.MATH):
        assert count_work(step)[0] == 3 * 16 * flops_per_token(config)
    again = 2 * config.n_heads * config.head_dim * 16 * config.n_layers
    fused = 3 * 16 * (flops_per_token(config) + again)
    assert count_work(step)[0] == fused


def test_bytes_are_those_of_reading_and_writing():
    a, b = torch.randn(2, 30, 30)
    size = 30 * 30 * 4
    for call, times in [
        (lambda: a + b, 3),
        (lambda: a * 2.0, 2),
        (lambda: a.sum(0), 1 + 1 / 30),
        (lambda: a.T, 0),
        (lambda: a[:, 3:].reshape(-1, 3) is None, 27 / 15),
        (lambda: a.mul_(b), 3),
        (lambda: torch.add(a, b, out=torch.empty_like(a)), 3),
        (lambda: torch._foreach_add_([a], [b]), 3),
        (lambda: a.bfloat16(), 1.5),
    ]:
        assert count_work(call) == (0, round(times * size))


def test_the_fused_update_moves_fewer_bytes():
    moved = []
    for optimizer in (torch.optim.AdamW, module.AdamW):
        step = TrainingStep(tiny(), 2, optimizer=optimizer)
        step()
        step.loss(*step.batch).backward()
        moved.append(count_work(step.optimizer.step)[1])
    assert all(m > 7 * 4 * 50 * 32 for m in moved)


@pytest.mark.parametrize("T, block", itertools.product((1, 5, 64), (1, 3, 64)))
def test_blocks_agree_with_torch(T, block):
    q, k, v = torch.randn(3, 2, 2, T, 4) * 2
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    ours = blocked_attention(q, k, v, block)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True
    )
    assert torch.allclose(ours, theirs, atol=1e-4)
    grads = [
        torch.autograd.grad(x.square().sum(), (q, k, v), retain_graph=True)
        for x in (ours, theirs)
    ]
    for one, other in zip(*grads):
        assert torch.allclose(one, other, atol=1e-2, rtol=1e-3)


def test_the_timeline_ends_where_it_began():
    step = TrainingStep(tiny(), 2)
    step()
    gc.collect()
    with MemoryTimeline() as line:
        step()
    assert line.series()[-1] <= 4 * line.pieces[0][2]
    assert max(line.series()) > 0 and min(line.series()) >= 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_highest_moment_is_what_the_estimator_says(kind):
    config = tiny(**kind | dict(n_layers=4))
    series, ends = memory_timeline(TrainingStep(config, 16))
    most = max(map(sum, zip(*series.values())))
    guess = training_bytes(config, 16)["total"]
    assert abs(guess / most - 1) < 0.12
    assert ends["forward"] < ends["backward"] < ends["update"]


def test_spans_are_nested_and_add_up():
    step = TrainingStep(tiny(), 2)
    spans = trace(step, step.model)
    assert spans[0].depth == 0 and min(s.depth for s in spans[1:]) == 1
    for before, after in itertools.pairwise(spans):
        assert after.depth <= before.depth + 1
        assert after.start >= before.start - 1
    assert math.isclose(sum(time_by_kind(spans).values()), 1)
    assert not step.model.blocks[0]._forward_hooks
    assert {"attention", "feed_forward", "block 1"} <= {s.name for s in spans}


def test_a_report_survives_json_and_makes_rows():
    config = tiny()
    told = []
    report = benchmark(
        config=config, batch_size=1, quick=True, said=told.append
    )
    back = json.loads(json.dumps(report))
    rows, header = report_rows(back)
    assert len(rows) == len(back["kernels"])
    assert told == list(dict.fromkeys(k["name"] for k in back["kernels"]))
    assert {len(row) for row in rows} == {len(header)}
    assert all(p > 0 for p in back["peaks"].values())
    assert list(back["peaks"]) == list(PRECISIONS)


def test_the_precisions_of_a_kernel_take_turns(monkeypatch):
    asked, routes = [], []

    def note(calls, rounds):
        asked.append(list(calls))
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(module, "time_calls", note)
    report = benchmark(config=tiny(), batch_size=1, quick=True)
    assert {tuple(kinds) for kinds in asked} == {PRECISIONS, ("fp32",)}
    assert [k["precision"] for k in report["kernels"]] == sum(asked, [])
    for precision in PRECISIONS:
        module._by_route(
            lambda: routes.append(torch.get_float32_matmul_precision()),
            precision,
        )()
    assert routes == ["highest", "medium", "highest"]


def test_the_route_is_put_back_after_an_error():
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), matmul_route("fp32, fast"):
            assert torch.get_float32_matmul_precision() == "medium"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_every_device_is_found_by_the_name_torch_gives():
    for name, device in DEVICES.items():
        assert find_device(f"NVIDIA {name}") == device
        assert device.source and device.ridge > 100
    for name in (
        "Tesla T4",
        "Tesla V100-SXM2-32GB",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA H100 80GB HBM3",
        "NVIDIA GeForce RTX 4090",
        "AMD Instinct MI300X",
    ):
        assert find_device(name) is not None, name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA T400",
        "NVIDIA A10",
        "AMD EPYC",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA RTX 4000 Ada Generation",
        "Tesla V100-SXM2-16GB",
    ],
)
def test_another_card_does_not_borrow_a_peak(name):
    assert find_device(name) is None


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: check_device("tpu"), ("tpu", "cpu")),
        (lambda: benchmark("cuda:9"), ("cuda:9", "cpu")),
        (lambda: time_calls({"": list}, rounds=0), ("rounds", "0")),
        (lambda: amdahl(1.2, 3), ("share", "1.2")),
        (lambda: amdahl(0.5, 0), ("speedup", "0")),
        (lambda: mfu(0, 1, 1), ("tokens_per_second", "0")),
        (lambda: mfu(1, 1, float("nan")), ("peak", "nan")),
        (
            lambda: blocked_attention(*torch.randn(3, 1, 1, 2, 2), block=0),
            ("block", "0"),
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_the_roof_is_never_exceeded_in_the_formula():
    for intensity in (0.01, 1, 10, 1e6):
        got = attainable(intensity, 1e12, 1e10)
        assert got <= 1e12 and got <= intensity * 1e10
    assert amdahl(0, 9) == 1 and amdahl(1, 9) == 9


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_clock_waits_for_a_card(monkeypatch, kind):
    done = []
    here = {
        "cuda": (torch.cuda, "is_initialized"),
        "mps": (torch.backends.mps, "is_available"),
    }
    monkeypatch.setattr(*here[kind], lambda: True)
    card = getattr(torch, kind)
    monkeypatch.setattr(card, "synchronize", lambda: done.append("wait"))
    assert module._seconds(lambda: done.append("call"), 2) > 0
    assert done == ["wait", "call", "call", "wait"]


@pytest.fixture
def pretended_card(monkeypatch):
    "PyTorch says there is an H200; what would run on it is only noted."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    asked, x = [], torch.randn(8, 8)

    def stand_in(name, call):
        def pieces(*args):
            asked.append((name, *args))
            for precision in args[3:] or PRECISIONS:  # as of a model
                yield name, precision, call

        return pieces

    monkeypatch.setattr(
        module, "_products", stand_in("product, n = 8", lambda: x @ x)
    )
    monkeypatch.setattr(
        module, "_streams", stand_in("sum, 64 numbers", lambda: x + x)
    )
    monkeypatch.setattr(
        module, "_pieces", stand_in("training step", lambda: x @ x)
    )
    return asked


def test_a_card_is_asked_for_larger_work(pretended_card):
    config = tiny()
    report = benchmark("cuda", config, 4)
    assert pretended_card[:2] == [
        ("product, n = 8", "cuda", 8192),
        ("sum, 64 numbers", "cuda", 2**27),
    ]
    assert pretended_card[2:] == [
        ("training step", config, 4, "cuda", p) for p in PRECISIONS
    ]
    assert report["machine"]["device"] == "NVIDIA H200"
    assert find_device(report["machine"]["device"]) == DEVICES["H200"]
    assert len(report_rows(report)[0]) == 9


def test_tensors_are_made_where_they_are_asked_for():
    for made in (
        module._products("meta", 64),
        module._streams("meta", 2**12),
    ):
        for _, _, call in made:
            assert call().device.type == "meta"


@pytest.fixture
def cell_for_a_card(monkeypatch):
    "Its code, made small; what it would keep comes back as a dictionary."
    book = Path(__file__).parent.parent / "nbs" / "10_performance.ipynb"
    cells = json.loads(book.read_text())["cells"]
    (code,) = (
        source
        for source in ("".join(cell["source"]) for cell in cells)
        if source.startswith("#| slow") and '"cuda"' in source
    )
    code = code.replace('16, "cuda", "bf16", wrap=torch.compile', "16")
    code = code.replace('benchmark("cuda")', "{}")
    kept = {}

    def run(card):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
        mine = {
            "preset": lambda name: tiny(),
            "flops_per_token": flops_per_token,
            "keep": lambda part, content: kept.update({part: content}),
        }
        exec(code, vars(module) | mine)
        return kept["gpu"]

    return run


def test_the_cell_for_a_card_runs(cell_for_a_card):
    kept = cell_for_a_card("NVIDIA H200")
    assert 0 < kept["MFU"] < 1 and kept["GPT-2 step"] > 0


def test_an_unknown_card_is_named_before_anything_is_timed(
    cell_for_a_card, monkeypatch
):
    monkeypatch.delattr(module, "TrainingStep")
    with pytest.raises(ValueError, match="'NVIDIA H200 NVL' is not in DEVI"):
        cell_for_a_card("NVIDIA H200 NVL")
