"""Alignment: losses against trl and against NumPy, and hostile input."""

import collections
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import count_listings
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch import alignment as al
from llm_from_scratch.model import ModelConfig, TransformerLM
from llm_from_scratch.tokenizer import END_OF_TEXT, Tokenizer
from llm_from_scratch.training import Diverged

TOKENIZER = Tokenizer([])
END = TOKENIZER.special_tokens[END_OF_TEXT]


def make_model(seed=0, context_length=32):
    torch.manual_seed(seed)
    return TransformerLM(
        ModelConfig(
            vocab_size=257,
            context_length=context_length,
            d_model=16,
            n_layers=1,
            n_heads=2,
            tie_embeddings=False,
        )
    ).eval()


def make_pairs(n=6):
    code = TOKENIZER.encode_ordinary
    return [
        al.Pair(code(f"say {i}:"), [*code("yes"), END], [*code("no"), END])
        for i in range(n)
    ]


# ------------------------------------------------------------- the same as trl


class Accelerator:
    "What trl asks of its accelerator, on one process."

    num_processes = 1
    device = torch.device("cpu")

    def gather(self, x):
        return x

    def gather_for_metrics(self, x):
        return x

    def reduce(self, x, reduction):
        return x


def trl_dpo(kind, logs, ref_logs, mask, beta):
    "The loss of trl's trainer, with a model that says what we tell it."
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer

    class Says(torch.nn.Module):
        is_gradient_checkpointing = False

        def __init__(self, logs):
            super().__init__()
            self.logs = logs

        def forward(self, **kwargs):
            zero = torch.zeros_like(self.logs)
            return SimpleNamespace(
                log_probs=self.logs,
                entropy=zero,
                mean_logits=zero,
                is_top1=zero > 1,
            )

    stub = SimpleNamespace(
        model=Says(logs),
        ref_model=Says(ref_logs),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        args=SimpleNamespace(
            gradient_checkpointing_kwargs=None, gradient_checkpointing=False
        ),
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics=collections.defaultdict(
            lambda: collections.defaultdict(list)
        ),
        _total_train_tokens=0,
        _tp_size=1,
    )
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask.long(),
    }
    return trainer._compute_loss(stub, stub.model, inputs, False)


def random_pairs(n=5, T=9, seed=0):
    "Log-probabilities (2n, T), zero outside the answers."
    generator = torch.Generator().manual_seed(seed)
    logs, ref_logs = -3 * torch.rand(2, 2 * n, T, generator=generator)
    sizes = torch.randint(1, T + 1, (2 * n, 1), generator=generator)
    mask = torch.arange(T) < sizes
    return logs * mask, ref_logs * mask, mask


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_dpo_is_trls(beta):
    logs, ref_logs, mask = random_pairs()
    whole = torch.cat([torch.zeros(len(mask), 1) > 0, mask], 1)
    theirs = trl_dpo("sigmoid", logs, ref_logs, whole, beta)
    four = [*logs.sum(-1).split(5), *ref_logs.sum(-1).split(5)]
    assert abs(al.dpo_loss(*four, beta) - theirs) < 1e-6


def test_ipo_is_trls_for_answers_of_one_token():
    "trl divides by the length, as the authors told them they had done."
    logs, ref_logs, _ = random_pairs(T=1)
    mask = torch.tensor([[False, True]] * 10)
    theirs = trl_dpo("ipo", logs, ref_logs, mask, 0.3)
    four = [*logs.sum(-1).split(5), *ref_logs.sum(-1).split(5)]
    assert abs(al.ipo_loss(*four, 0.3) - theirs) < 1e-5


def trl_grpo(kind, logs, old, ref_logs, advantages, mask, clip, beta):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        args=SimpleNamespace(
            use_bias_correction_kl=False,
            delta=None,
            steps_per_generation=1,
        ),
        loss_type=kind,
        epsilon_low=clip,
        epsilon_high=clip,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=mask.shape[1],
        _entropy_bonus_enabled=False,
        _metrics=collections.defaultdict(
            lambda: collections.defaultdict(list)
        ),
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            logs,
            torch.zeros_like(logs),
            None,
        ),
    )
    n, T = mask.shape
    inputs = {
        "prompt_ids": torch.zeros(n, 2, dtype=torch.long),
        "prompt_mask": torch.ones(n, 2, dtype=torch.long),
        "completion_ids": torch.zeros(n, T, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref_logs,
    }
    return trainer._compute_loss(stub, stub.model, inputs)


@pytest.mark.parametrize(
    "per, kind", [("answer", "grpo"), ("token", "bnpo"), ("sum", "dr_grpo")]
)
def test_grpo_is_trls(per, kind):
    logs, ref_logs, mask = random_pairs(n=4, seed=1)
    old = logs + 0.4 * torch.randn(logs.shape) * mask
    apart = al.group_advantages(torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1]), 4)
    theirs = trl_grpo(kind, logs, old, ref_logs, apart, mask, 0.2, 0.05)
    k3 = al.kl_estimates(logs, ref_logs)[2]
    ours = al.clipped_loss(logs, old, apart[:, None], mask, 0.2, per)
    ours = ours + 0.05 * al.average(k3, mask, per)
    if per == "sum":  # theirs is divided by the room of an answer
        ours = ours / mask.shape[1]
    assert abs(ours - theirs) < 1e-6


# ---------------------------------------- the same as NumPy, from the papers


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_relatives_are_as_their_papers_say():
    good, bad, ref_good, ref_bad = -9 * np.random.default_rng(0).random((4, 7))
    n, m = np.arange(1, 8), np.arange(7, 0, -1)
    h = np.log(np.exp(good) * np.exp(ref_bad) / np.exp(bad) / np.exp(ref_good))
    tensors = [torch.tensor(x) for x in (good, bad, ref_good, ref_bad)]
    assert np.isclose(
        al.ipo_loss(*tensors, 0.2).item(), np.mean((h - 1 / 0.4) ** 2)
    )
    simpo = -np.log(sigmoid(2.5 / n * good - 2.5 / m * bad - 0.7))
    assert np.isclose(
        al.simpo_loss(
            *tensors[:2], torch.tensor(n), torch.tensor(m), 2.5, 0.7
        ).item(),
        simpo.mean(),
    )
    r = np.concatenate([good - ref_good, bad - ref_bad])
    wanted = np.repeat([1, -1], 7)  # desirable, undesirable
    value = sigmoid(0.1 * wanted * (r - 0.8))
    ours = al.kto_loss(
        tensors[0] - tensors[2], tensors[1] - tensors[3], 0.8, 0.1
    )
    assert np.isclose(ours.item(), np.mean(1 - value))


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_advantages_are_the_double_sum(sizes, gamma, lam):
    T = 8
    rng = np.random.default_rng(len(sizes))
    mask = np.array([[1 <= t <= n for t in range(T)] for n in sizes])
    rewards, values = rng.normal(size=(2, len(sizes), T)) * mask
    ours = al.generalized_advantages(
        *map(torch.tensor, (rewards, values, mask)), gamma, lam
    )
    wanted = np.zeros_like(rewards)
    for i, n in enumerate(sizes):
        after = np.append(values[i, 1 : n + 1], 0.0)
        delta = rewards[i, 1 : n + 1] + gamma * after[1:] - after[:-1]
        for t in range(n):
            powers = (gamma * lam) ** np.arange(n - t)
            wanted[i, t + 1] = (powers * delta[t:]).sum()
    assert np.allclose(ours, wanted)


@given(st.integers(2, 5), st.integers(1, 4), st.booleans(), st.integers(0, 9))
def test_group_advantages_look_at_their_own_group(size, n, scale, seed):
    rewards = np.random.default_rng(seed).random((n, size))
    wanted = rewards - rewards.mean(1, keepdims=True)
    if scale:
        wanted /= rewards.std(1, ddof=1, keepdims=True) + 1e-4
    ours = al.group_advantages(torch.tensor(rewards).flatten(), size, scale)
    assert np.allclose(ours, wanted.flatten())


def make_rollout():
    "Three answers of 2, 1 and 3 tokens, the prompts of one."
    torch.manual_seed(3)
    ids = torch.randint(0, 250, (3, 4))
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1]]) > 0
    logs, ref_logs = -torch.rand(2, 3, 3) * mask[:, 1:]
    rewards = torch.tensor([1.0, 0.0, 0.5])
    return al.Rollout(ids, mask, ["", "", ""], rewards, logs, ref_logs)


def test_going_away_costs_beta_a_nat():
    batch, config = make_rollout(), al.AlignConfig("reinforce", beta=0.3)
    earned = batch.rewards - 0.3 * (batch.logs - batch.ref_logs).sum(-1)
    ours, wanted = al.advantages(batch, config)
    assert wanted is None
    assert torch.allclose(
        ours, (earned - earned.mean())[:, None] * batch.mask[:, 1:]
    )


def test_ppo_pays_at_the_end_and_charges_on_the_way():
    batch, config = make_rollout(), al.AlignConfig("ppo", beta=0.3, lam=1.0)
    critic = al.ScalarHead(make_model())
    torch.nn.init.normal_(critic.trunk.head.weight)
    apart, wanted = al.advantages(batch, config, critic)
    paid = -0.3 * (batch.logs - batch.ref_logs)
    for row, last in enumerate((1, 0, 2)):
        paid[row, last] += batch.rewards[row]
    there = batch.mask[:, 1:]
    later = paid.flip(-1).cumsum(-1).flip(-1)  # lam 1: all that is to come
    assert torch.allclose(wanted[there], later[there], atol=1e-5)
    plain = (later - critic(batch.ids[:, :-1]).detach())[there]
    plain = (plain - plain.mean()) / (plain.std() + 1e-4)
    assert torch.allclose(apart[there], plain, atol=1e-4)
    assert not apart[~there].any() and not apart.requires_grad


def test_clipping_leaves_mistakes_a_way_back():
    ratio = torch.tensor([[0.5, 1.0, 1.5]], requires_grad=True)
    for sign, wanted in ((1.0, [1, 1, 0]), (-1.0, [0, -1, -1])):
        loss = al.clipped_loss(
            ratio.log(),
            torch.zeros(1, 3),
            sign * torch.ones(1, 3),
            torch.ones(1, 3) > 0,
            0.2,
            "sum",
        )
        (slope,) = torch.autograd.grad(-loss, ratio)
        assert slope[0].tolist() == wanted


def test_kl_estimates_are_right_in_the_mean():
    logs, ref_logs = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    p, true = logs.exp(), (logs.exp() * (logs - ref_logs)).sum()
    k1, k2, k3 = al.kl_estimates(logs, ref_logs)
    assert torch.allclose((p * k1).sum(), true)
    assert torch.allclose((p * k3).sum(), true) and (k3 >= 0).all()
    assert torch.allclose(k2, (logs - ref_logs) ** 2 / 2)


def test_clipped_loss_begins_as_reinforce():
    logs = torch.randn(3, 5, requires_grad=True)
    apart, mask = torch.randn(3, 5), torch.ones(3, 5) > 0
    (ours,) = torch.autograd.grad(
        al.clipped_loss(logs, logs.detach(), apart, mask), logs
    )
    (plain,) = torch.autograd.grad(-(logs * apart).mean(), logs)
    assert torch.allclose(ours, plain)


# ------------------------------------------------------------------- verifier


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.text("abc")
)
def test_verifier_is_the_gyms(letters, answer):
    reasoning_gym = pytest.importorskip("reasoning_gym")
    gym = reasoning_gym.create_dataset("palindrome_generation", size=1, seed=0)
    theirs = gym.score_answer(answer, {"metadata": {"letters": letters}})
    ours = al.palindrome_score(answer, {"letters": letters})
    assert ours == (theirs == 1)


# -------------------------------------------------------------------- sampling


def test_answers_do_not_depend_on_their_neighbours():
    model = make_model()
    prompts = [TOKENIZER.encode_ordinary(t) for t in ("a", "long one", "mid")]
    together = al.sample_answers(model, prompts, 2, 10, END, temperature=0)
    alone = [
        al.sample_answers(model, [p], 1, 10, END, temperature=0)[0]
        for p in prompts
    ]
    assert together == [alone[i // 2] for i in range(6)]


def test_answers_are_drawn_from_the_policy():
    model, prompt = make_model(), [5, 6, 7]
    with torch.no_grad():
        wanted = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    drawn = al.sample_answers(
        model, [prompt], 20_000, 1, generator=torch.Generator().manual_seed(0)
    )
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=257)
    spread = (wanted * (1 - wanted) / 20_000).sqrt()
    assert ((counts / 20_000 - wanted).abs() < 5 * spread + 1e-4).all()


def test_nothing_follows_the_end():
    model = make_model()
    drawn = al.sample_answers(
        model, [[1, 2]], 3000, 6, 9, generator=torch.Generator().manual_seed(1)
    )
    assert any(9 in row for row in drawn)
    assert all(9 not in row[:-1] for row in drawn)


@pytest.mark.parametrize("size", [0, 25, 32, 99])
def test_prompt_that_fills_the_context_is_named(size):
    prompts = [[1], [1] * size]
    with pytest.raises(ValueError, match=f"prompt 1 has {size} ids"):
        al.sample_answers(make_model(), prompts, 1, 8)
    with pytest.raises(ValueError, match=f"prompt 1 has {size} ids"):
        al.align_rewards(
            make_model(),
            [(p, {}) for p in prompts],
            lambda a, e: 0.0,
            TOKENIZER,
            al.AlignConfig("grpo", max_new_tokens=8),
        )


def test_pair_that_does_not_fit_is_named():
    pairs = [*make_pairs(2), al.Pair([1] * 20, [2] * 20, [3])]
    with pytest.raises(ValueError, match="pair 2 has 40 ids"):
        al.align_pairs(make_model(), pairs)


# ------------------------------------------------------------------ the loops


@pytest.mark.parametrize("method", al.PAIR_METHODS)
def test_pairs_are_learned(method):
    model = make_model()
    beta = 2.0 if method == "simpo" else 0.1
    config = al.AlignConfig(method, 12, 6, 1e-2, beta)
    log = al.align_pairs(model, make_pairs(), config)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert log[-1]["accuracy"] == 1


def first_record(**settings):
    config = al.AlignConfig(
        n_steps=1, batch_size=6, precision="fp32", **settings
    )
    return al.align_pairs(make_model(), make_pairs(), config)[0]


def logs_of(answers):
    pairs = make_pairs()
    ids, mask = al.join_answers(
        [p.prompt_ids for p in pairs], [getattr(p, answers) for p in pairs]
    )
    with torch.no_grad():
        return al.log_probability(make_model(), ids, mask)


def test_simpo_is_measured_without_a_reference():
    good, bad = logs_of("chosen_ids") / 4, logs_of("rejected_ids") / 3
    for gamma in (0.0, 1.5):
        record = first_record(method="simpo", beta=2.0, gamma=gamma)
        margin = 2 * (good - bad)
        wanted = np.log1p(np.exp(gamma - margin.numpy())).mean()
        assert abs(record["loss"] - wanted) < 1e-5
        assert abs(record["margin"] - margin.mean()) < 1e-5
        assert abs(record["accuracy"] - (margin > 0).float().mean()) < 1e-6


def test_imitation_is_cross_entropy_on_the_chosen():
    a_token = -logs_of("chosen_ids").sum() / (4 * 6)
    plain, more = first_record(), first_record(imitate=0.5)
    assert abs(plain["loss"] - np.log(2)) < 1e-6
    assert abs(more["loss"] - plain["loss"] - 0.5 * a_token) < 1e-5


def test_a_critic_learns_at_its_own_rate(monkeypatch):
    rates = []

    def watch(optimizer, params, loss, step, settings):
        rates.append(settings.learning_rate)
        optimizer.zero_grad()

    monkeypatch.setattr(al, "apply_gradients", watch)
    config = al.AlignConfig(
        "ppo",
        1,
        2,
        2e-3,
        group_size=2,
        max_new_tokens=3,
        epochs=1,
        critic_rate=7e-3,
    )
    al.align_rewards(
        make_model(), [([1], {})], lambda a, e: 1.0, TOKENIZER, config
    )
    assert rates == [2e-3, 7e-3]


@pytest.mark.parametrize("method", al.REWARD_METHODS)
def test_rewards_are_learned_and_repeatable(method):
    def reward(answer, entry):
        return sum(c in "aeiou" for c in answer) / 4

    ends, problems = [], [([1, 2], {}), ([3], {})]
    config = al.AlignConfig(
        method, 25, 8, 1e-2, 0.0, max_new_tokens=4, precision="fp32"
    )
    for _ in range(2):
        model = make_model()
        log = al.align_rewards(model, problems, reward, TOKENIZER, config)
        ends.append(log)
    assert ends[0] == ends[1]
    first, last = (
        np.mean([r["reward"] for r in part]) for part in (log[:5], log[-5:])
    )
    assert last > 2 * first
    assert log[0]["kl"] == 0 < log[-1]["kl"]


@pytest.mark.parametrize("bad", ["nan", "inf", "raise", "text"])
def test_a_reward_that_fails_stops_the_run_and_keeps_the_batch(bad, tmp_path):
    def reward(answer, entry):
        if entry["at"] == 1:
            if bad == "raise":
                raise ZeroDivisionError("by nought")
            return "much" if bad == "text" else float(bad)
        return 1.0

    problems = [([1, 2], {"at": 0}), ([3], {"at": 1})]
    config = al.AlignConfig("grpo", 3, 2, group_size=4, max_new_tokens=3)
    model, kept = make_model(), tmp_path / "batch.jsonl"
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(al.BadReward, match="failed for 4 of 8") as caught:
        al.align_rewards(
            model, problems, reward, TOKENIZER, config, keep_in=kept
        )
    assert str(kept) in str(caught.value)
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 8 and sum(r["reward"] is None for r in rows) == 4
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("method", al.REWARD_METHODS)
def test_a_run_told_to_skip_goes_on_without_the_answer(method, capsys):
    def reward(answer, entry):
        return float("nan") if entry["at"] else len(answer) / 3

    problems = [([1, 2], {"at": 0}), ([3], {"at": 1})]
    config = al.AlignConfig(
        method, 3, 2, group_size=4, max_new_tokens=3, on_bad_reward="skip"
    )
    model = make_model()
    log = al.align_rewards(model, problems, reward, TOKENIZER, config)
    assert len(log) == 3 and "failed for 4 of 8" in capsys.readouterr().err
    assert all(p.isfinite().all() for p in model.parameters())


def test_every_batch_that_failed_is_kept(tmp_path, capsys):
    def reward(answer, entry):
        return float("nan") if entry["at"] else 1.0

    problems = [([1, 2], {"at": 0}), ([3], {"at": 1})]
    config = al.AlignConfig(
        "grpo", 3, 2, group_size=4, max_new_tokens=3, on_bad_reward="skip"
    )
    kept = tmp_path / "new" / "batch.jsonl"
    al.align_rewards(
        make_model(), problems, reward, TOKENIZER, config, keep_in=kept
    )
    said = capsys.readouterr().err.splitlines()
    assert [x for x in said if x.endswith(f"is in {kept}, step 3")] == said[2:]
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [r["step"] for r in rows] == [1] * 8 + [2] * 8 + [3] * 8
    assert sum(r["reward"] is None for r in rows) == 12
    kept.write_bytes(kept.read_bytes()[:-5])  # a disk was full
    al.score_answers(reward, ["a"], [{"at": 1}], "skip", kept, 9)
    lines = kept.read_text().splitlines()
    assert len(lines) == 25 and json.loads(lines[-1])["step"] == 9


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_parameters_are_listed_once(method, monkeypatch):
    model, counts = make_model(), []
    seen = count_listings(monkeypatch, model)
    for n_steps in (1, 4):
        seen.clear()
        config = al.AlignConfig(
            method, n_steps, 1, group_size=2, max_new_tokens=2
        )
        al.align_rewards(
            model, [([1], {})], lambda a, e: len(a), TOKENIZER, config
        )
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


def test_a_run_without_any_reward_changes_nothing():
    config = al.AlignConfig(
        "ppo", 2, 2, group_size=2, max_new_tokens=3, on_bad_reward="skip"
    )
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    log = al.align_rewards(
        model, [([1], {})], lambda a, e: float("nan"), TOKENIZER, config
    )
    assert log == [] and all(map(torch.equal, before, model.parameters()))


def test_weights_that_are_no_numbers_are_not_spread():
    model = make_model()
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(Diverged, match="step 1"):
        al.align_pairs(model, make_pairs())


# ---------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dop"},
        {"n_steps": 0},
        {"n_steps": 2.5},
        {"batch_size": True},
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"beta": -1},
        {"beta": 0, "method": "dpo"},
        {"beta": 0.1, "method": "simpo"},
        {"group_size": 1},
        {"per": "row"},
        {"on_bad_reward": "ignore"},
        {"clip": "0.2"},
        {"precision": "fp8"},
        {"scale": 1},
        {"gamma": -0.5},
        {"imitate": float("inf")},
    ],
)
def test_settings_are_checked_when_made(settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"{name} is"):
        al.AlignConfig(**settings)


def test_a_method_of_the_other_family_is_refused():
    with pytest.raises(ValueError, match="learns from rewards"):
        al.align_pairs(make_model(), make_pairs(), al.AlignConfig("grpo"))
    with pytest.raises(ValueError, match="learns from pairs"):
        al.align_rewards(
            make_model(), [([1], {})], len, TOKENIZER, al.AlignConfig("dpo")
        )


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="pairs is empty"):
        al.align_pairs(make_model(), [])
    with pytest.raises(ValueError, match="problems is empty"):
        al.align_rewards(make_model(), [], len, TOKENIZER)


# ----------------------------------------------------------------------- files

GOOD = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 2"),
        ("[]", "line 2: not an object"),
        ('{"prompt": "a", "chosen": "b"}', "line 2: 'rejected' is missing"),
        (json.dumps(GOOD | {"rejected": "4"}), "line 2: chosen and rejected"),
        (json.dumps(GOOD | {"chosen": " "}), "line 2: chosen is ' '"),
        (json.dumps(GOOD | {"chosen": None}), "line 2: chosen is None"),
        (json.dumps(GOOD | {"prompt": ""}), "line 2: prompt is ''"),
        (json.dumps(GOOD | {"prompt": 7}), "line 2: prompt is 7"),
        (json.dumps(GOOD | {"prompt": []}), "line 2: messages must"),
        (json.dumps(GOOD | {"prompt": ["hi"]}), "line 2: message 1 must"),
        (
            json.dumps(GOOD | {"prompt": [{"role": "bot", "content": "a"}]}),
            "line 2: message 1 has the role 'bot'",
        ),
        (
            json.dumps(
                GOOD
                | {
                    "prompt": [
                        {"role": "user", "content": "a"},
                        {"role": "assistant", "content": "b"},
                    ]
                }
            ),
            "line 2: the last",
        ),
        ("[" * 100_000, "line 2"),
    ],
)
def test_bad_lines_are_named(line, said, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=said):
        al.read_pairs(path, TOKENIZER, END)


def test_files_that_are_none_are_named(tmp_path):
    for content in (None, "", "\n\n", b"\xff\xfe"):
        path = tmp_path / "pairs.jsonl"
        if content is not None:
            path.write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
        with pytest.raises(ValueError, match="pairs.jsonl"):
            al.read_pairs(path, TOKENIZER, END)


def test_files_are_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n")
    (pair,) = al.read_pairs(path, TOKENIZER, END)
    assert TOKENIZER.decode(pair.prompt_ids) == "2+2="
    assert pair.chosen_ids[-1] == END
    problems = al.read_problems(path, TOKENIZER)
    assert problems == [(pair.prompt_ids, GOOD)]
    assert al.exact_reward(" 4\n", {"answer": 4}) == 1


def test_what_the_reward_needs_is_looked_for(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n')
    assert len(al.read_problems(path, TOKENIZER)) == 2
    with pytest.raises(ValueError, match="line 2: 'answer' is missing"):
        al.read_problems(path, TOKENIZER, ["answer"])


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        al.AlignConfig().beta = 2.0
