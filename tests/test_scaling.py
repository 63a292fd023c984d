"""What the chapter on scaling does not show: hostile input and crashes."""

import json
import math

import numpy as np
import pytest
import torch

from llm_from_scratch.data import Windows
from llm_from_scratch.model import TransformerLM, flops_per_token, preset
from llm_from_scratch.performance import DEVICES
from llm_from_scratch.scaling import (
    MACHINES,
    PUBLISHED,
    LossLaw,
    Machine,
    Trial,
    book_fit,
    build,
    describe,
    family,
    find_machine,
    fit_law,
    fit_runs,
    measure_machine,
    mup_groups,
    mup_initialize,
    noise_scale,
    plan,
    read_budget,
    run_trial,
    run_trials,
    shape_for,
    steps_to_loss,
    working_parameters,
)
from llm_from_scratch.training import (
    AdamW,
    TrainConfig,
    parameter_groups,
    train_step,
)

IDS = np.random.default_rng(0).integers(97, 123, size=40_000)


def test_at_the_base_width_mup_changes_nothing():
    windows, config = Windows(IDS, 64, 4), TrainConfig(precision="fp32")
    ours, optimizer = build(Trial(32, 4096, base_width=32))
    torch.manual_seed(0)
    plain = TransformerLM(family(32))
    usual = AdamW(parameter_groups(plain, 0.0))
    for step in range(3):
        train_step(ours, optimizer, windows, step, config)
        train_step(plain, usual, windows, step, config)
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert torch.equal(a, b)


def test_mup_groups_hold_every_parameter_once():
    model = TransformerLM(family(64))
    groups = mup_groups(model, 32, weight_decay=0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    # the rate times the decay does not hang on the width
    decays = [g["share"] * g["weight_decay"] for g in groups]
    assert decays == [pytest.approx(0.1), 0.0]


def test_tied_models_are_refused_by_mup():
    with pytest.raises(ValueError, match="tie_embeddings"):
        mup_initialize(
            TransformerLM(
                preset("gpt2-124m", d_model=64, n_heads=4, n_layers=1)
            ),
            32,
        )


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-3.1-8b"])
def test_working_parameters_explain_the_operations(name):
    config = preset(name)  # without attention's scores
    assert 6 * working_parameters(config) == pytest.approx(
        flops_per_token(config, context=0), rel=0.01
    )


def test_a_sweep_goes_on_after_half_a_line(tmp_path):
    path = tmp_path / "runs.jsonl"
    trials = [Trial(16, 2048), Trial(32, 2048)]
    first = run_trials(trials, IDS, IDS, path)
    path.write_text(path.read_text()[:-20])  # killed while writing
    assert run_trials(trials, IDS, IDS, path) == first
    assert [
        json.loads(line) for line in path.read_text().splitlines()
    ] == first


def test_a_sweep_goes_on_where_only_the_line_end_is_missing(tmp_path):
    path = tmp_path / "runs.jsonl"
    trials = [Trial(16, 2048, seed=seed) for seed in range(3)]
    first = run_trials(trials[:2], IDS, IDS, path)
    path.write_text(path.read_text()[:-1])
    run_trials(trials, IDS, IDS, path)
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert [json.loads(line) for line in lines[:2]] == first


def test_a_file_that_is_no_sweep_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("one\ntwo\n", '{"a": 1}\n{"b": 2}\n', "[]\n7\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="line 1, is no run"):
            run_trials([Trial(16, 2048)], IDS, IDS, path)
        assert path.read_text() == text


def test_a_run_that_breaks_down_has_no_loss():
    record = run_trial(Trial(16, 4096, learning_rate=1e30), IDS, IDS)
    assert record["loss"] is None or math.isfinite(record["loss"])
    with pytest.raises(ValueError, match="failed"):
        fit_law(
            [1e4, 3e4, 1e5] * 2,
            [1e5, 2e5, 4e5] * 2,
            [2.0, 1.9, 1.8, 1.9, 1.7, math.nan],
        )


@pytest.mark.parametrize("trial", [(16, 63, 1e-3), (16, 10, 1e-3, 32, 0)])
def test_trials_of_no_step_are_refused(trial):
    with pytest.raises(ValueError, match="n_tokens"):
        Trial(*trial)


def test_text_is_not_read_twice():
    with pytest.raises(ValueError, match="read twice"):
        run_trial(Trial(16, 50_000), IDS, IDS)


def test_a_target_that_is_not_reached_gives_none():
    assert (
        steps_to_loss(Trial(16, 64 * 64, batch_size=2), 0.1, IDS, IDS) is None
    )


@pytest.mark.parametrize(
    "runs, word",
    [
        (([1e4] * 4, [1e5] * 4, [2.0] * 4), "six runs"),
        (([1e4] * 6, [1e5, 2e5, 3e5] * 2, [2.0] * 6), "at least three"),
        (([1e4, 2e4, 4e4] * 2, [1e5, 2e5, -1] * 2, [2.0] * 6), "positive"),
        (([1e4, 2e4] * 3, [1e5] * 5, [2.0] * 6), "six runs"),
    ],
)
def test_runs_that_do_not_tell_are_refused(runs, word):
    with pytest.raises(ValueError, match=word):
        fit_law(*runs)


def test_the_optimum_is_a_minimum_for_every_law():
    for law in [book_fit().law, *PUBLISHED.values()]:
        for flops in (1e12, 1e18, 1e24):
            N, D = law.optimal(flops)
            assert 6 * N * D / flops == pytest.approx(1)
            for other in (0.9 * N, 1.1 * N):
                assert law.loss(N, D) < law.loss(other, flops / 6 / other)


def test_the_corrected_law_grows_both_alike():
    law = PUBLISHED["besiroglu"]  # 0.5126 in the paper
    assert law.beta / (law.alpha + law.beta) == pytest.approx(0.5126, abs=2e-4)
    N, D = law.optimal(5.76e23)  # Chinchilla's budget: about 20 a parameter
    assert 15 < D / N < 30


def test_bootstrap_is_the_same_with_the_same_seed():
    law = LossLaw(1.2, 8.0, 0.4, 120.0, 0.45)
    N, D = (a.ravel() for a in np.meshgrid([1e4, 1e5, 1e6], [2e5, 1e6, 5e6]))
    loss = law.loss(N, D) * (1 + 0.01 * np.sin(np.arange(9)))
    a, b = (fit_runs(N, D, loss, 20, seed=3) for _ in range(2))
    assert a.interval(1e5, 1e6) == b.interval(1e5, 1e6)
    low, high = a.interval(1e5, 1e6)
    assert low < a.law.loss(1e5, 1e6) < high


def test_noise_scale_needs_two_gradients():
    with pytest.raises(ValueError, match="two"):
        noise_scale(torch.ones(1, 5), 4)
    assert noise_scale(torch.tensor([[1.0], [-1.0]]), 4) == math.inf


@pytest.mark.parametrize("N", [1e4, 3e6, 1e9, 3e11])
def test_shapes_are_near(N):
    assert abs(math.log(working_parameters(shape_for(N)) / N)) < 0.3


def test_a_size_below_all_shapes_is_refused():
    with pytest.raises(ValueError, match="nearest"):
        shape_for(100)


@pytest.mark.parametrize("flops", [0, -1, 1e8, 1e31, math.nan, math.inf])
def test_absurd_operations_are_refused(flops):
    with pytest.raises(ValueError, match="flops"):
        plan(flops)


@pytest.mark.parametrize(
    "budget", ["0h", "-3h", "10", "ten hours", "", "1e3h", "99999d", "h"]
)
def test_absurd_times_are_refused(budget):
    with pytest.raises(ValueError, match="budget"):
        read_budget(budget, None, MACHINES["laptop"])


def test_one_budget_and_not_two():
    for given in [(None, None), ("10h", 1e18)]:
        with pytest.raises(ValueError, match="either"):
            read_budget(*given, MACHINES["laptop"])
    assert read_budget("90min", None, Machine(2.0, 1e9)) == 10800.0
    assert read_budget("1.5 h", None, Machine(2.0, 1e9)) == 10800.0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="h100"):
        find_machine("h10")
    with pytest.raises(ValueError, match="law"):
        plan(1e15, "moore")


def test_this_machine_can_be_measured():
    machine = measure_machine(0.1)
    assert 1e7 < machine.flops < 1e15
    assert machine.memory > 1e8


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="machines or more"):
        plan(1e25, "besiroglu", MACHINES["h100"])


def test_a_plan_spends_its_budget():
    machine = MACHINES["laptop"]
    p = plan(read_budget("10h", None, machine), "besiroglu", machine)
    spent = flops_per_token(p.config) * p.n_tokens
    assert spent == pytest.approx(p.flops, rel=1e-3)
    assert p.seconds == pytest.approx(36000)
    assert p.interval is None
    assert ("time", "10.0 hours") in describe(p)


@pytest.mark.parametrize("flops", [3.5e12, 1e18])
def test_beyond_the_grid_no_share_of_runs_is_promised(flops):
    near, far = (dict(describe(plan(budget))) for budget in (3.3e12, flops))
    assert "90 of 100 runs lie in" in near
    assert "times our largest run" not in near
    assert "90 of 100 draws lie in" in far and "times our largest run" in far


@pytest.mark.parametrize("law", PUBLISHED)
def test_the_planned_size_is_near_the_best(law):
    "With the exact cost of a token, which counts the scores of attention."
    p = plan(1e18, law)

    def reached(config):
        tokens = p.flops / flops_per_token(config)
        return PUBLISHED[law].loss(working_parameters(config), tokens)

    N = working_parameters(p.config)
    shapes = [shape_for(x * N, 32768, 2048) for x in np.geomspace(0.3, 3, 20)]
    assert reached(p.config) < 1.003 * min(map(reached, shapes))


def test_machines_are_those_of_the_performance_chapter():
    for name, key in [("a100", "A100-SXM4-80GB"), ("h100", "H100 80GB")]:
        assert MACHINES[name].flops == 0.4 * DEVICES[key].tflops * 1e12
        assert MACHINES[name].memory == DEVICES[key].memory * 1e9
