"""Training that cannot work ends with an error at the first step that shows it, also under a plain Trainer."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from veneer import IA3Config, LoraConfig, PromptTuningConfig, TargetError, TrainableTokensConfig, get_peft_model
from veneer.errors import TrainingError
from veneer.model.guard import PATIENCE

from . import models
from .cases import ONE_EACH, Case

TARGETS = ["q_proj", "down_proj"]


def lora(name: str = "llama", **settings):
    return get_peft_model(models.build(name), LoraConfig(**dict(r=3, target_modules=TARGETS) | settings)).train()


def step(model, optimizer, **more):
    batch = models.inputs("llama")
    loss = model(**batch, labels=batch["input_ids"], **more).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def trainer(model, tmp_path, rows=None, optimizers=(None, None), **settings):
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, 67, (8, 7), generator=torch.Generator().manual_seed(0)).tolist()
    rows = rows or [{"input_ids": row, "labels": row} for row in ids]
    settings = dict(max_steps=12, per_device_train_batch_size=2, report_to="none", use_cpu=True) | settings
    return Trainer(model, TrainingArguments(tmp_path, **settings), train_dataset=rows, optimizers=optimizers)


def masked_rows():
    return [{"input_ids": [3, 4, 5, 6], "labels": [-100] * 4} for _ in range(8)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_labels_that_are_all_masked(accumulate: int, tmp_path):
    with pytest.raises(TrainingError, match="all 8 labels of the batch are -100"):
        trainer(lora(), tmp_path, masked_rows(), gradient_accumulation_steps=accumulate).train()
    with pytest.raises(TrainingError, match="labels"):
        lora()(**models.inputs("llama"), labels=torch.full((3, 7), -100))


@pytest.mark.filterwarnings("ignore")
def test_one_masked_part_of_a_batch_is_fine(tmp_path):
    """Trainer counts the labels of all its parts; evaluation is not training."""
    good = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]} for _ in range(8)]
    rows = [row for pair in zip(good, masked_rows(), strict=True) for row in pair]
    trainer(
        lora(),
        tmp_path,
        rows,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
        max_steps=2,
        train_sampling_strategy="sequential",
    ).train()
    model = lora().eval()
    model(**models.inputs("llama"), labels=torch.full((3, 7), -100))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value: float, tmp_path):
    """Before the step that would spoil the adapter."""
    model = lora()
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] = value
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    with pytest.raises(TrainingError, match="the loss of training call 1 is"):
        trainer(model, tmp_path).train()
    assert all(
        torch.equal(p, q) for p, q in zip((p for p in model.parameters() if p.requires_grad), before, strict=True)
    )


def spoilt_outside(model, value: float) -> None:
    """A backward pass of a loss by hand that is not finite, which the model does not see."""
    logits = model(**models.inputs("llama")).logits
    (logits.square().mean() * value).backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("late", [0, PATIENCE + 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_by_hand_that_is_not_finite(value: float, late: int):
    """Told by its gradient, at the first step as at any later one, before it spoils the adapter."""
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(late):
        spoilt_outside(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    spoilt_outside(model, value)
    with pytest.raises(TrainingError, match="gradient of adapter 'default' is not finite"):
        optimizer.step()
    assert all(
        torch.equal(p, q) for p, q in zip((p for p in model.parameters() if p.requires_grad), before, strict=True)
    )


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_the_trainer_computes_and_is_not_finite(tmp_path):
    """With smoothed labels `Trainer` takes the labels out of the call."""
    model = lora()
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        trainer(model, tmp_path, label_smoothing_factor=0.1).train()
    assert all(p.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore")
def test_what_a_gradient_scaler_leaves_out_is_no_fault():
    """It tries with too large a scale on purpose, and tells a fused optimizer what overflowed."""
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    spoilt_outside(model, float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**16), torch.tensor(1.0)
    optimizer.step()
    assert all(
        torch.equal(p, q) for p, q in zip((p for p in model.parameters() if p.requires_grad), before, strict=True)
    )


class Checkpointed(nn.Module):
    """Checkpointing of the reentrant kind over a frozen embedding: nothing at its entrance needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(67, 6), nn.Linear(6, 67)

    def forward(self, input_ids, labels):
        logits = checkpoint(self.body, self.embedding(input_ids), use_reentrant=True)
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.filterwarnings("ignore")
def test_no_gradient_under_checkpointing_of_frozen_embeddings():
    model = get_peft_model(Checkpointed(), LoraConfig(r=2, target_modules=["body"])).train()
    with pytest.raises(TrainingError, match="no gradient reaches adapter 'default'.*enable_input_require_grads"):
        step(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))


@pytest.mark.filterwarnings("ignore")
def test_the_gradient_of_a_head_is_not_the_adapters():
    """A copy that is trained whole lies behind what is cut off, and learns by itself."""
    model = lora(modules_to_save=["lm_head"], bias="all")
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.get_base_model().disable_input_require_grads()
    with pytest.raises(TrainingError, match="no gradient reaches adapter 'default'.*enable_input_require_grads"):
        step(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))


@pytest.mark.filterwarnings("ignore")
def test_a_head_may_be_trained_alone():
    model = lora(modules_to_save=["lm_head"])
    for name, p in model.named_parameters():
        p.requires_grad_("lm_head" in name and p.requires_grad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(PATIENCE + 1):
        step(model, optimizer)


@pytest.mark.filterwarnings("ignore")
def test_a_transformers_model_under_reentrant_checkpointing_learns():
    """The model's own switch, past ours, as ours: the embeddings' output is made to need a gradient."""
    model = lora()
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    batch = models.inputs("llama")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_no_gradient_after_a_detached_loss():
    model, batch = lora(), models.inputs("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    extra = nn.Parameter(torch.zeros(()))
    logits = model(**batch).logits
    (logits.detach().square().mean() * extra).backward()
    with pytest.raises(TrainingError, match="no gradient reaches adapter 'default': after the backward pass"):
        optimizer.step()


def stale(model_before):
    return torch.optim.AdamW(model_before.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_made_before_the_adapter(tmp_path):
    base = models.build("llama")
    optimizer = stale(base)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=TARGETS)).train()
    with pytest.raises(TrainingError, match="the optimizer holds .* all of them frozen, and none of adapter 'default'"):
        trainer(model, tmp_path, optimizers=(optimizer, None)).train()


def test_an_optimizer_of_another_copy():
    """It knows nothing of this model; that the adapter stays as it is shows it."""
    model = lora()
    optimizer = stale(copy.deepcopy(model))
    for i in range(PATIENCE):
        batch = models.inputs("llama")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        if i < PATIENCE - 1:
            optimizer.step()
    with pytest.raises(TrainingError, match="no optimizer that made a step holds its parameters"):
        optimizer.step()


def test_an_adapter_that_does_not_change():
    """In half precision the steps are lost to rounding."""
    model = lora(init_lora_weights="orthogonal", r=2).to(torch.bfloat16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    for _ in range(PATIENCE - 1):
        step(model, optimizer)
    with pytest.raises(TrainingError, match="lost to rounding"):
        step(model, optimizer)


def test_warming_up_from_zero_is_not_standing_still():
    model = lora()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(2 * PATIENCE):
        step(model, optimizer)
    optimizer.param_groups[0]["lr"] = 1.0
    for _ in range(PATIENCE):
        step(model, optimizer)


def test_other_optimizers_are_left_alone():
    """That of another model, and those of a second adapter's turn."""
    model = lora()
    model.add_adapter("other", IA3Config())
    groups = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        groups[name] = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    strange = nn.Linear(2, 2)
    strange_optimizer = torch.optim.SGD(strange.parameters(), lr=0.1)
    for _ in range(PATIENCE + 2):
        for name, optimizer in groups.items():
            model.set_adapter(name)
            step(model, optimizer)
        strange(torch.ones(2)).sum().backward()
        strange_optimizer.step()


@pytest.mark.parametrize("case", [c for c in ONE_EACH if not c.siblings and c.model in ("llama", "gpt2")], ids=str)
def test_no_false_alarm(case: Case):
    """Every method trains over as many steps as the guard looks at."""
    model = case.build(moved=False).train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    for _ in range(PATIENCE + 1):
        batch = case.inputs()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# Modules that the model reads without running them


def test_an_embedding_that_is_not_run():
    """T5's `shared` lends its weight to two others and never runs."""
    model = get_peft_model(
        models.build("t5"), LoraConfig(r=2, target_modules=["shared", "q"], task_type="SEQ_2_SEQ_LM")
    )
    with pytest.raises(TargetError, match="(?s)'default' has no effect.*shared.*'encoder.embed_tokens'"):
        model(**models.inputs("t5"))
    with pytest.raises(TargetError):
        get_peft_model(models.build("t5"), LoraConfig(target_modules=["q"], modules_to_save=["shared"]))(
            **models.inputs("t5")
        )


@pytest.mark.parametrize(
    "config",
    [
        TrainableTokensConfig(token_indices=[3, 4]),
        LoraConfig(r=2, target_modules=["encoder.embed_tokens", "decoder.embed_tokens"]),
        LoraConfig(r=2, target_modules=["wo"]),
        PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_what_runs_by_another_name_is_fine(config):
    """Adapters that follow ties; weights of which the model looks at the dtype."""
    model, batch = get_peft_model(models.build("t5"), config), models.inputs("t5")
    models.output(model, batch)
    model.generate(input_ids=batch["input_ids"], max_new_tokens=3)


def test_a_matrix_that_is_read_past_its_module():
    """Mamba multiplies by out_proj.weight itself."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=67, time_step_rank=3)
    batch = {"input_ids": torch.randint(3, 67, (2, 5))}

    class Reads(nn.Module):
        """The fused kernel's call, which needs a GPU: the weight and not the module."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out_proj = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return nn.functional.linear(self.inner(x), self.out_proj.weight, self.out_proj.bias)

    model = get_peft_model(Reads(), LoraConfig(r=2, target_modules=["inner", "out_proj"]))
    with pytest.raises(TargetError, match="(?s)without running them:\n  out_proj"):
        model(torch.randn(2, 4))
    fine = get_peft_model(MambaForCausalLM(MambaConfig(**sizes)), LoraConfig(r=2, target_modules=["in_proj"]))
    fine(**batch)


def test_embeddings_that_a_caller_brings_need_no_layer():
    model = lora(target_modules=["embed_tokens", "q_proj"])
    model(inputs_embeds=torch.randn(2, 5, 30))
    model(**models.inputs("llama"))
