"""What a recipe chooses for training acts: optimizers, learning rates, schedules, and noise on the embeddings."""

from __future__ import annotations

import math

import pytest
import torch

from veneer.errors import VeneerError
from veneer.ops.optimizer import FlatAdamW
from veneer.train import trainer as trainers
from veneer.train.optimizers import by_name
from veneer.train.optimizers.lorafa import Projection
from veneer.train.optimizers.riemannian import Preconditioner

from .test_train import base, data, failing, run, tensors  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore")
RATE = 1e-2
FLAT = dict(learning_rate=RATE, schedule="constant", warmup=0, max_steps=1)


@pytest.fixture
def made(monkeypatch) -> list:
    """(optimizer, model) of each run."""
    seen = []
    true = by_name.correct_gradients

    def note(optimizer, model, recipe) -> None:
        true(optimizer, model, recipe)
        seen.append((optimizer, {name: group(optimizer, p) for name, p in model.named_parameters() if p.requires_grad}))

    monkeypatch.setattr(by_name, "correct_gradients", note)
    return seen


def group(optimizer, parameter) -> dict:
    (found,) = [one for one in optimizer.param_groups if any(p is parameter for p in one["params"])]
    return {name: value for name, value in found.items() if name in ("lr", "weight_decay")}


# Learning rates


def test_lora_plus(base, data, tmp_path, made):  # noqa: F811
    """B learns 16 times as fast; A and B of an embedding at their own rate; the logged rate is that of A."""
    targets = ["q_proj", "embed_tokens"]
    report = run(base, data, tmp_path / "o", lora_plus_ratio=16, weight_decay=0.1, targets=targets, **FLAT)
    optimizer, parameters = made[0]
    assert isinstance(optimizer, FlatAdamW) and report["history"][0]["learning_rate"] == RATE
    wanted = {"lora_A": RATE, "lora_B": 16 * RATE, "lora_embedding_A": 1e-6, "lora_embedding_B": 1e-6}
    for kind, rate in wanted.items():
        of_kind = [found for name, found in parameters.items() if kind in name]
        assert of_kind and all(found == {"lr": pytest.approx(rate), "weight_decay": 0.1} for found in of_kind), kind


def test_lora_plus_moves_B_further(base, data, tmp_path):  # noqa: F811
    """With AdamW, the first step of each number is its rate."""
    plain = run(base, data, tmp_path / "plain", **FLAT) and tensors(tmp_path / "plain")
    plus = run(base, data, tmp_path / "plus", lora_plus_ratio=16, **FLAT) and tensors(tmp_path / "plus")
    for name in plain:
        ratio = 16 if "lora_B" in name else 1  # B starts at zero
        if "lora_B" in name:
            torch.testing.assert_close(plus[name].abs().max(), ratio * plain[name].abs().max(), rtol=1e-3, atol=0)
        else:
            torch.testing.assert_close(plus[name], plain[name])


def test_rates_by_layer_and_by_name(base, data, tmp_path, made):  # noqa: F811
    """The factors of LoRA+, of the layer and of each pattern multiply."""
    settings = dict(layer_decay=0.5, rates={"lora_A": 3, r"mlp\.": 0.1}, lora_plus_ratio=4, targets="all-linear")
    run(base, data, tmp_path / "o", **FLAT, **settings)
    _, parameters = made[0]
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in parameters}
    assert len(layers) > 1
    for name, found in parameters.items():
        depth = int(name.split("layers.")[1].split(".")[0])
        factor = 0.5 ** (max(layers) - depth) * (3 if "lora_A" in name else 4) * (0.1 if ".mlp." in name else 1)
        assert found["lr"] == pytest.approx(RATE * factor), name


# Optimizers


def test_optimizers_by_name(base, data, tmp_path, made):  # noqa: F811
    from torch import optim

    pytest.importorskip("bitsandbytes")
    from bitsandbytes import optim as of_bitsandbytes

    kinds = {
        "adamw_torch": FlatAdamW,
        "adamw": FlatAdamW,
        "sgd": optim.SGD,
        "nadam": optim.NAdam,
        "adamax": optim.Adamax,
        "adamw8bit": of_bitsandbytes.AdamW8bit,
        "paged_adamw_8bit": of_bitsandbytes.AdamW,
        "adam32bit": of_bitsandbytes.Adam32bit,
    }
    results = {}
    for name, kind in kinds.items():
        run(base, data, tmp_path / name, optimizer=name, **FLAT)
        assert type(made[-1][0]) is kind, name
        results[name] = torch.cat([t.flatten() for t in tensors(tmp_path / name).values()])
    assert torch.equal(results["adamw"], results["adamw_torch"]) and not torch.equal(results["sgd"], results["nadam"])


def test_options_reach_the_optimizer(base, data, tmp_path, made):  # noqa: F811
    options = {"betas": [0.5, 0.6], "eps": 1e-3}
    run(base, data, tmp_path / "o", optimizer_options=options, weight_decay=0.2, **FLAT)
    found = made[0][0].param_groups[0]
    assert (tuple(found["betas"]), found["eps"], found["weight_decay"], found["lr"]) == ((0.5, 0.6), 1e-3, 0.2, RATE)
    run(base, data, tmp_path / "p", optimizer="sgd", optimizer_options={"momentum": 0.9, "nesterov": True}, **FLAT)
    assert made[1][0].param_groups[0]["nesterov"] is True


@pytest.mark.parametrize(("name", "hook"), [("lora_fa", Projection), ("riemannian", Preconditioner)])
def test_our_own_optimizers(base, data, tmp_path, made, name: str, hook: type):  # noqa: F811
    plain = run(base, data, tmp_path / "plain", **FLAT | {"max_steps": 3})
    report = run(base, data, tmp_path / "o", optimizer=name, **FLAT | {"max_steps": 3})
    optimizer, parameters = made[1]
    hooks = [one for one in optimizer._optimizer_step_pre_hooks.values() if isinstance(one, hook)]
    assert len(hooks) == 1 and type(optimizer) is FlatAdamW and report["losses"] != plain["losses"]
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "o")
    assert any(not torch.equal(before[key], after[key]) for key in before if "lora_B" in key)
    has_A = any("lora_A" in key for key in parameters)
    assert has_A == (name == "riemannian")
    if name == "lora_fa":
        assert report["trainable_parameters"] < plain["trainable_parameters"] and optimizer.defaults["eps"] == 1e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "nadamm"}, "no optimizer 'nadamm'; nearest: nadam"),
        ({"optimizer": "lbfgs"}, "'lbfgs' cannot be used: it evaluates the loss several times"),
        ({"optimizer": "lamb8bit"}, "scales a step by the norm of the weight"),
        ({"optimizer": "galore_adamw"}, "works on whole weights"),
        ({"optimizer": "adalomo"}, "works on whole weights"),
        ({"optimizer_options": {"beta": 1}}, "'adamw_torch' has no option 'beta'; nearest: betas"),
        ({"optimizer": "sgd", "optimizer_options": {"reg": 1}}, "'sgd' has no option 'reg'"),
        ({"schedule": "cosine", "schedule_options": {"num_cycle": 1}}, "no option 'num_cycle'; nearest: num_cycles"),
        ({"schedule": "linear", "schedule_options": {"power": 1}}, "no option 'power'; it has none"),
        ({"schedule": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate"),
        ({"schedule": "warmup_stable_decay"}, "num_decay_steps"),
        ({"schedule": "polynomial", "schedule_options": {"power": "x", "lr_end": 2.0}}, "smaller"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_anything_is_loaded(tmp_path, settings: dict, words: str):
    failing(VeneerError, words, "no-such-model", "no-such.jsonl", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rates": {"q_prj": 2}}, "'q_prj' matches no trained parameter; nearest: q_proj"),
        ({"rates": {"(": 2}}, "is not a regular expression"),
        ({"optimizer": "lora_fa", "method": "ia3", "rank": None}, "no active LoRA adapter"),
        ({"lora_plus_ratio": 2, "method": "ia3", "rank": None}, "no active LoRA adapter"),
        ({"layer_decay": 0.5, "method": "prompt_tuning", "rank": None}, "needs numbered layers"),
        ({"optimizer": "lora_fa", "targets": ["embed_tokens"]}, "A is zero"),
    ],
)
def test_what_does_not_fit_the_adapter_is_refused(base, data, tmp_path, settings: dict, words: str):  # noqa: F811
    failing(VeneerError, words, base, data, tmp_path / "out", **settings)


# Schedules


def test_schedules_take_their_arguments(base, data, tmp_path):  # noqa: F811
    """The logged rates are those of the formulas."""
    settings = dict(learning_rate=RATE, warmup=0, max_steps=6)

    def rates(where: str, **more) -> list[float]:
        report = run(base, data, tmp_path / where, **settings, **more)
        return [entry["learning_rate"] / RATE for entry in report["history"]]

    floor = rates("floor", schedule="cosine_with_min_lr", schedule_options={"min_lr_rate": 0.25})
    wanted = [0.25 + 0.75 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert floor == pytest.approx(wanted)
    square = rates("square", schedule="polynomial", schedule_options={"power": 2.0, "lr_end": 0.0})
    assert square == pytest.approx([(1 - step / 6) ** 2 for step in range(6)], abs=1e-6)
    stable = rates("stable", schedule="warmup_stable_decay", schedule_options={"num_decay_steps": 2})
    assert stable[:4] == [1.0] * 4 and stable[4:] == pytest.approx([1.0, 0.5])
    plateau = {"patience": 0, "factor": 0.5, "threshold": 0.99}
    stairs = rates("plateau", schedule="reduce_lr_on_plateau", schedule_options=plateau, eval_split=4, eval_every=1)
    assert stairs[0] == 1.0 and stairs[-1] < 0.3


# NEFTune


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"targets": ["embed_tokens", "q_proj"]},
        {"method": "trainable_tokens", "rank": None, "options": {"token_indices": list(range(250))}},
        {"method": "prompt_tuning", "rank": None},
        {"gradient_checkpointing": True},
        {"fast": False},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_noise_is_on_the_embeddings_in_training_only(base, data, tmp_path, monkeypatch, settings: dict):  # noqa: F811
    """Uniform, of at most alpha / sqrt(length x width); whatever adapts the embedding. Evaluation has none."""
    alpha = 5.0
    largest: list[float] = []
    true = trainers.ExactTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        embedding = self.accelerator.unwrap_model(model).get_base_model().get_input_embeddings()
        heard: list[torch.Tensor] = []
        handle = embedding.register_forward_hook(lambda module, given, output: heard.append(output.detach()))
        result = true(self, model, inputs, *args, **kwargs)
        handle.remove()
        embedding.eval()
        with torch.no_grad():
            clean = embedding(inputs["input_ids"])
        embedding.train()
        rows, length, width = clean.shape
        noise = (heard[0][..., -length:, :] - clean).abs().max()
        largest.append(float(noise) / (alpha / math.sqrt(length * width)))
        assert rows > 1, "rows end to end would share one long row's noise"
        return result

    monkeypatch.setattr(trainers.ExactTrainer, "compute_loss", compute_loss)
    own = (
        dict(max_steps=3, eval_split=4, options={"lora_dropout": 0.0})
        if "method" not in settings
        else dict(max_steps=3)
    )
    noisy = run(base, data, tmp_path / "noisy", neftune_alpha=alpha, **own | settings)
    assert len(largest) == 3 and all(0.9 < share <= 1.0 + 1e-3 for share in largest), largest
    monkeypatch.setattr(trainers.ExactTrainer, "compute_loss", true)
    plain = run(base, data, tmp_path / "plain", **own | settings)
    assert noisy["losses"][0] != plain["losses"][0]
    if "eval_split" in own:
        assert noisy["eval"]["before"]["loss"] == pytest.approx(plain["eval"]["before"]["loss"], rel=1e-6)
