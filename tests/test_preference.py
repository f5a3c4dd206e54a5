"""Training on pairs of answers: the objectives as TRL computes them, and runs as exact as those on single answers."""

from __future__ import annotations

import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import veneer
from veneer import LoraConfig, get_peft_model, ops
from veneer.data.collate import Collator
from veneer.data.encode import Encoder
from veneer.data.preferences import PairEncoder, preferences, understand
from veneer.data.sources import Source
from veneer.errors import ConfigError, DataError
from veneer.model.catalogue import page
from veneer.train import preference, trainer
from veneer.train.objectives import ALL
from veneer.train.objectives.base import Answers
from veneer.train.run import train

from . import models
from .forked import forked
from .forked import veneer as verb
from .test_train import base, recipe, same  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [
    {"prompt": f"{a} + {b}?", "chosen": f"{a + b}", "rejected": f"not {a + b + 1}, I think"}
    for a in range(3, 9)
    for b in range(2, 6)
]


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def run(base, data, output, **settings) -> dict:  # noqa: F811
    settings = dict(objective="dpo") | settings
    return train(recipe(base, data, output, **settings), console=Console(quiet=True))


# The objectives


def answers(seed: int, reference: bool = True) -> Answers:
    draw = torch.Generator().manual_seed(seed)
    log_p, of_reference = (-40 * torch.rand(6, generator=draw) for _ in range(2))
    tokens = torch.randint(2, 30, (6,), generator=draw).float()
    return Answers(log_p, of_reference if reference else None, tokens)


def test_simpo_and_orpo_are_trls():
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = answers(1, reference=False), answers(2, reference=False)
    on_cpu = SimpleNamespace(device="cpu")
    settings = dict(beta=2.0, loss_type="simpo", simpo_gamma=1.0, label_smoothing=0.0, alpha=0.0, accelerator=on_cpu)
    want, *_ = CPOTrainer.cpo_loss(SimpleNamespace(**settings), chosen.mean, rejected.mean)
    torch.testing.assert_close(ALL["simpo"]().losses(chosen, rejected), want)
    settings = SimpleNamespace(beta=0.1, accelerator=on_cpu)
    ratio, *_ = ORPOTrainer.odds_ratio_loss(settings, chosen.mean, rejected.mean)
    torch.testing.assert_close(ALL["orpo"]().losses(chosen, rejected), -chosen.mean - ratio)


def test_orpo_is_finite_for_an_answer_that_is_certain():
    certain = Answers(torch.zeros(1), None, torch.ones(1))
    assert ALL["orpo"]().losses(certain, certain).isfinite().all()


def test_smoothed_labels_and_the_weight_of_the_chosen_answer():
    chosen, rejected = answers(1), answers(2)
    plain = ALL["dpo"]().losses
    want = 0.8 * plain(chosen, rejected) + 0.2 * plain(rejected, chosen)
    torch.testing.assert_close(ALL["dpo"](label_smoothing=0.2).losses(chosen, rejected), want)
    want = plain(chosen, rejected) - 0.5 * chosen.mean
    torch.testing.assert_close(ALL["dpo"](sft_weight=0.5).losses(chosen, rejected), want)


DPO = {
    "sigmoid": dict(loss_type="sigmoid"),
    "hinge": dict(loss_type="hinge"),
    "ipo": dict(loss_type="ipo"),
}


@pytest.mark.parametrize("name", DPO)
def test_loss_and_gradients_of_dpo_are_those_of_trl_with_peft(base, tmp_path, name):  # noqa: F811
    """On one batch and from the same adapter; TRL gets our tokens, padded."""
    import peft
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    ours = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    ours.save_pretrained(tmp_path / "adapter")
    theirs = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, beta=0.3, **DPO[name]),
        train_dataset=Dataset.from_list(ROWS[:4]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, task_type="CAUSAL_LM"),
    )
    peft.set_peft_model_state_dict(theirs.model, peft.load_peft_weights(str(tmp_path / "adapter")))

    encoder = PairEncoder(Encoder(tokenizer, 1024))
    rows = list(encoder.encode(understand("row", row) for row in ROWS[:4]))
    batch = preference.PairCollator(Collator(tokenizer.pad_token_id))(rows)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # TRL has the chosen answers first
    at = batch["slot"].argsort()[order]
    labels = batch["labels"][at]
    call = {name: batch[name][at] for name in ("input_ids", "attention_mask")}
    want = theirs._compute_loss(theirs.model.train(), call | {"completion_mask": (labels != -100).long()}, False)
    want.backward()

    wanted = ALL["dpo"](beta=0.3, loss=name)
    learner = SimpleNamespace(
        objective=wanted, _adapted=lambda: ours, is_sharded=False, kept=torch.empty(0, 2), start=[]
    )
    for method in ("_measures", "_reference", "_as_reference", "_keeps"):
        setattr(learner, method, getattr(preference.PreferenceTrainer, method).__get__(learner))
    losses = learner._measures(ours.train(), batch)[:, 0]
    losses.mean().backward()
    assert float(losses.mean()) == pytest.approx(float(want), rel=1e-5)
    assert abs(float(want) - math.log(2)) > 1e-3  # the adapter does something
    found = {preference_key(n): p.grad for n, p in ours.named_parameters() if p.requires_grad}
    for n, p in theirs.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[preference_key(n)], p.grad, rtol=1e-4, atol=1e-7, msg=n)


def preference_key(name: str) -> str:
    return name.replace(".adapters.default.", ".").replace(".default.", ".")


ROPES = {"llama": models.llama, "gpt2": models.gpt2, "window": lambda **sizes: windowed(**sizes)}


def windowed(**sizes):
    from transformers import MistralConfig, MistralForCausalLM

    shape = dict(hidden_size=30, intermediate_size=45, num_hidden_layers=2, num_attention_heads=5)
    return MistralForCausalLM(MistralConfig(**shape, num_key_value_heads=1, head_dim=6, sliding_window=6, **sizes))


@pytest.mark.parametrize("kind", ROPES)
def test_every_layout_of_a_batch_gives_the_same(base, kind):  # noqa: F811
    """Padded, in a row, and in a row with each prompt computed once: log-probabilities and gradients."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = PairEncoder(Encoder(tokenizer, 1024))
    longer = {"prompt": "7?", "chosen": "seven, which is more than five", "rejected": "5"}
    rows = list(encoder.encode(understand("row", row) for row in [*ROWS[:2], longer]))
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(ROPES[kind](vocab_size=len(tokenizer)), config).train()
    weights = torch.linspace(-1, 2, 6).view(3, 2)
    found, lengths = [], []
    for flat, shares in ((False, False), (True, False), (True, True)):
        batch = preference.PairCollator(Collator(tokenizer.pad_token_id, flat=flat), shares)(rows)
        lengths.append(batch["input_ids"].numel())
        model.zero_grad()
        with ops.attention.by_sequence(model.get_base_model(), batch["continued"].tolist()):
            log_p = preference.log_probabilities(model, model, batch)
            (log_p * weights).sum().backward()
        found.append((log_p.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert lengths[2] < lengths[1] < lengths[0]
    for log_p, grads in found[1:]:
        torch.testing.assert_close(log_p, found[0][0], rtol=1e-5, atol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][1][name], rtol=1e-4, atol=1e-5, msg=name)

    alone = rows[1]["rejected"]
    scores = model(input_ids=torch.tensor([alone["input_ids"]])).logits[0, :-1].log_softmax(-1)
    learned = [(i, label) for i, label in enumerate(alone["labels"][1:]) if label != -100]
    assert float(found[2][0][1, 1]) == pytest.approx(sum(float(scores[i, label]) for i, label in learned), rel=1e-5)


def test_a_model_whose_sequences_affect_each_other_shares_no_prompt(base, monkeypatch):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(base)
    (row,) = PairEncoder(Encoder(tokenizer, 1024)).encode([understand("row", ROWS[0])])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM"))
    flat = Collator(tokenizer.pad_token_id, flat=True)
    assert preference.shares_prompts(model, row, flat)
    monkeypatch.setattr(ops.attention, "_with_beginnings", lambda parts, continued: list(parts))
    assert not preference.shares_prompts(model, row, flat)


# Runs


@pytest.mark.parametrize("objective", ALL)
def test_a_run_learns_and_says_what(base, data, tmp_path, objective):  # noqa: F811
    report = run(base, data, tmp_path / "out", objective=objective, epochs=4, eval_split=4, learning_rate=3e-2)
    before, after = report["eval"]["before"], report["eval"]
    assert after["loss"] < before["loss"] and after["margin"] > before["margin"] and after["accuracy"] == 1
    assert report["verified"] is True and "perplexity" not in after
    assert report["history"][-1]["reward_margin"] > report["history"][0]["reward_margin"]
    assert report["recipe"]["objective_options"] == ALL[objective]().model_dump()
    assert report["data"]["kept"] == len(ROWS) and report["samples"]["rows"][0]["expected"].isdigit()
    assert report["samples"]["exact_match"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Preferences learned from pairs.jsonl" in page and "Margin of the rewards" in page
    assert "✗ wrong" not in page and "match exactly" not in page
    assert "<th>perplexity</th>" not in page and "<th>chosen_reward</th>" in page
    if objective == "dpo":
        assert report["losses"][0] == pytest.approx(math.log(2)) and before["accuracy"] == 0.5
    loaded = veneer.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.peft_config["default"].r == 4


def test_the_layout_of_batches_does_not_matter(base, data, tmp_path):  # noqa: F811
    """Nor do the fast paths, beyond rounding."""
    layouts = {
        "whole": {},
        "parts": dict(batch_size=1, accumulate=4),
        "padded": dict(fast=False),
        "checkpointing": dict(gradient_checkpointing=True),
    }
    losses = {}
    for name, settings in layouts.items():
        settings = dict(max_steps=5, eval_split=4, learning_rate=3e-2) | settings
        report = run(base, data, tmp_path / name, **settings)
        losses[name] = [*report["losses"], report["eval"]["loss"]]
    assert losses["whole"][-2] < losses["whole"][0]
    for name, found in losses.items():
        assert found == pytest.approx(losses["whole"], rel=2e-5), name


def test_the_reference_is_asked_once_for_a_pair(base, data, tmp_path, monkeypatch):  # noqa: F811
    """Over epochs and evaluations; never for an objective without one."""
    asked: list[int] = []
    true = preference.log_probabilities

    def spy(model, adapted, inputs):
        if not adapted._state.enabled:
            asked.append(len(inputs["pair"]))
        return true(model, adapted, inputs)

    monkeypatch.setattr(preference, "log_probabilities", spy)
    run(base, data, tmp_path / "one", epochs=1, eval_split=4)
    once = len(asked)
    assert once == 1 + 5  # one batch of evaluation, five of training
    asked.clear()
    run(base, data, tmp_path / "three", epochs=3, eval_split=4)
    assert len(asked) == once
    asked.clear()
    run(base, data, tmp_path / "none", objective="simpo", max_steps=2)
    assert asked == []


def test_the_reference_of_a_second_stage_is_the_adapter_that_it_starts_from(base, data, tmp_path):  # noqa: F811
    """So the first loss is that of no difference, and the stage before stays where it is."""
    first = run(base, data, tmp_path / "first", epochs=2, learning_rate=3e-2)
    assert first["losses"][-1] < math.log(2) - 1e-3
    before = same_files(tmp_path / "first")
    second = run(base, data, tmp_path / "second", start_from=str(tmp_path / "first"), epochs=2, learning_rate=3e-2)
    assert second["losses"][0] == pytest.approx(math.log(2)) and second["losses"][-1] < math.log(2) - 1e-3
    assert same_files(tmp_path / "first") == before and not same(tmp_path / "first", tmp_path / "second")


def same_files(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


KILLED = dict(epochs=3, eval_split=4, save_every=3, eval_every=3, options={"lora_dropout": 0.1})


def test_killed_and_resumed_is_as_never_killed(base, data, tmp_path, monkeypatch):  # noqa: F811
    """And the reference is not asked again: what it said lies in the checkpoint."""
    whole = run(base, data, tmp_path / "whole", **KILLED)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    def doomed() -> None:
        trainer._Epochs.on_step_end = on_step_end
        run(base, data, tmp_path / "killed", **KILLED)

    done = forked(doomed)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = tmp_path / "killed" / "checkpoints" / "checkpoint-6" / preference.KEPT_NAME
    assert not tensors_of(kept)["log_p"].isnan().any()
    true = preference.log_probabilities

    def spy(model, adapted, inputs):
        assert adapted._state.enabled, "the reference is asked"
        return true(model, adapted, inputs)

    monkeypatch.setattr(preference, "log_probabilities", spy)
    again = train(
        recipe(base, data, tmp_path / "killed", objective="dpo", **KILLED), resume=True, console=Console(quiet=True)
    )
    assert same(tmp_path / "whole", tmp_path / "killed")
    for key in ("losses", "steps", "real_tokens", "supervised_tokens"):
        assert again[key] == whole[key], key


def tensors_of(path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


METHODS = ("lora", "dora", "adalora", "ia3", "prefix_tuning", "p_tuning", "bottleneck", "hra", "shadow", "cpt", "vera")


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_every_kind_learn_preferences(base, data, tmp_path, method):  # noqa: F811
    """A term of the method's own is added to the objective, and logged apart from it."""
    report = run(base, data, tmp_path / "out", method=method, rank=None, epochs=2, learning_rate=5e-3)
    first = report["history"][0]
    assert report["verified"] is True and math.isfinite(report["losses"][-1])
    assert ("method_loss" in first) == (method == "adalora")


# Data


def written(tmp_path, rows) -> Source:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


USER = {"role": "user", "content": "2 + 2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
SHAPES = {
    "texts": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "prompt repeated": {"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes_are_the_same_pair(shape, tmp_path):
    (pair,) = preferences(written(tmp_path, [SHAPES[shape]]))
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [GOOD], [BAD])


def test_only_the_last_answers_are_learned(base, tmp_path):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(base)
    earlier = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}]
    row = {"chosen": [*earlier, USER, GOOD], "rejected": [*earlier, USER, BAD]}
    (encoded,) = PairEncoder(Encoder(tokenizer, 1024)).encode(preferences(written(tmp_path, [row])))
    for name, text in (("chosen", "4"), ("rejected", "5")):
        learned = [token for token in encoded[name]["labels"] if token != -100]
        assert tokenizer.decode(learned) == f"{text}<|im_end|>"


WRONG = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, "has the columns prompt, chosen; a preference needs"),
    "a slip": ({"prompt": "a", "chosen": "b", "rejectd": "c"}, r"rejectd; nearest: rejected"),
    "texts without a prompt": ({"chosen": "a b", "rejected": "a c"}, "texts without a prompt; give it"),
    "nothing in common": ({"chosen": [USER, GOOD], "rejected": [GOOD]}, "do not begin with the same message"),
    "ends with the user": ({"prompt": "a", "chosen": [USER], "rejected": [GOOD]}, "chosen must end with a message of"),
    "a number": ({"prompt": "a", "chosen": 4, "rejected": "5"}, "chosen must be text or a list of messages, not 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_row_is_said_with_its_number(name, tmp_path):
    row, words = WRONG[name]
    with pytest.raises(DataError, match=rf"rows.jsonl.*2.*{words}"):
        list(preferences(written(tmp_path, [SHAPES["texts"], row])))


def test_pairs_that_say_nothing_are_left_out_and_counted(base, tmp_path):  # noqa: F811
    rows = [
        SHAPES["texts"],
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "a", "chosen": " ", "rejected": "b"},
        {"prompt": "a", "chosen": "x" * 90 + "1", "rejected": "x" * 90 + "2"},
        {"prompt": "b" * 90, "chosen": "1", "rejected": "2"},
    ]
    source = written(tmp_path, rows)
    report = run(base, [source.model_dump()], tmp_path / "out", max_steps=1, max_length=60)
    counts = report["data"]
    assert counts["rows"] == 5 and counts["kept"] == 1 and counts["unlearned_rows"] == 0
    assert {what: note["rows"] for what, note in counts["notes"].items()} == {
        "a chosen answer that equals the rejected one: left out": 1,
        "an empty answer: left out": 1,
        "answers that are equal once they are cut to max_length: left out": 2,
    }
    with pytest.raises(
        DataError, match="no row of the data can be learned from: 1 row has a chosen answer that equals"
    ):
        run(base, [written(tmp_path, rows[1:2]).model_dump()], tmp_path / "none")


def test_what_the_template_leaves_out_is_counted_once_for_a_pair(base, tmp_path):  # noqa: F811
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    encoder = PairEncoder(Encoder(AutoTokenizer.from_pretrained(base), 1024))
    rows = [SHAPES["texts"] | {"tools": [tool]}, SHAPES["texts"]]
    assert len(list(encoder.encode(preferences(written(tmp_path, rows))))) == 2
    (note,) = encoder.account.notes.items()
    assert note[0] == "tools that the chat template does not write" and note[1].rows == 1


# Recipes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(objective="dpoo"), "objective = 'dpoo' must be"),
        (dict(objective_options={"bta": 1}), "objective dpo has no setting 'bta'; nearest: beta; it has beta, loss"),
        (dict(objective_options={"beta": -1}), "beta = -1 must be more than 0"),
        (dict(objective_options={"loss": "square"}), "loss = 'square' must be sigmoid, hinge or ipo"),
        (dict(objective="sft", objective_options={"beta": 1}), "objective sft has no settings; leave out beta"),
        (dict(beta=1), "no key 'beta': it is a setting of dpo and belongs under objective_options"),
        (dict(task="classification"), "a classifier writes no answers"),
        (dict(loss_on="all"), "compares answers; leave out loss_on"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        recipe("base", "data.jsonl", "out", **dict(objective="dpo") | settings)


def test_pairs_cannot_be_packed(base, data, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="pairs are compared with each other"):
        run(base, data, tmp_path / "out", packing=True)


def test_from_the_command_line(base, data, tmp_path):  # noqa: F811
    words = ["train", "--model", base, "--data", data, "--output", str(tmp_path / "out"), "--objective", "dpo"]
    done = verb(*words, "--set", "beta=0.4", "--set", "r=2", "--max-steps", "1", "--json")
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)["recipe"]
    assert settings["objective_options"]["beta"] == 0.4 and settings["options"] == {"r": 2}
    assert settings["learning_rate"] == pytest.approx(page("lora").learning_rate / 10)
