"""Plain `transformers.Trainer` trains, saves, resumes and picks the best: only the import of the tutorial changes."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils.data import Dataset

from veneer import AdaLoraConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from veneer.core.state import state_of

from . import models, room
from .cases import ONE_EACH, Case

pytestmark = pytest.mark.filterwarnings("ignore")


class Rows(Dataset):
    """Sequences that count upwards: learnable in a few steps."""

    def __init__(self, n: int = 24, classes: bool = False, **facts: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(3, 40, (n,), generator=generator)
        self.rows = [{"input_ids": torch.arange(s, s + 8), "labels": torch.arange(s, s + 8)} for s in starts]
        if classes:
            self.rows = [{"input_ids": r["input_ids"], "labels": r["input_ids"][0] % 3} for r in self.rows]
        for name, values in facts.items():
            self.rows = [row | {name: value} for row, value in zip(self.rows, values, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return self.rows[i]


def trainer(model, where, **kwargs):
    from transformers import Trainer, TrainingArguments

    settings = dict(
        output_dir=str(where),
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        dataloader_num_workers=0,
    )
    rows = kwargs.pop("rows", None) or Rows()
    return Trainer(model=model, args=TrainingArguments(**settings | kwargs), train_dataset=rows, eval_dataset=rows)


def adapted(**kwargs):
    base = models.build("gpt2").train()
    settings = dict(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
    torch.manual_seed(5)
    return get_peft_model(base, LoraConfig(**settings | kwargs))


def losses(run) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def values(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in state_of(model.get_base_model()).parameters("default")]


def test_the_loss_falls_and_the_base_stays(tmp_path):
    model = adapted()
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    run = trainer(model, tmp_path, max_steps=30)
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.5
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_a_checkpoint_holds_the_adapter_only(tmp_path):
    trainer(adapted(), tmp_path).train()
    files = os.listdir(tmp_path / "checkpoint-3")
    assert "adapter_model.safetensors" in files and "adapter_config.json" in files
    assert not [f for f in files if f.startswith(("model", "pytorch_model"))]


def test_resume_continues_exactly(tmp_path):
    whole = adapted()
    run = trainer(whole, tmp_path / "whole", save_steps=3)
    run.train()
    again = adapted()
    resumed = trainer(again, tmp_path / "again", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed)[-3:] == losses(run)[-3:]
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(again), strict=True))


def test_gradient_checkpointing_and_accumulation_change_nothing(tmp_path):
    plain, other = adapted(lora_dropout=0.0), adapted(lora_dropout=0.0)
    trainer(plain, tmp_path / "plain", per_device_train_batch_size=4).train()
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=True)
    trainer(other, tmp_path / "other", **settings).train()
    for a, b in zip(values(plain), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_reentrant_checkpointing_still_reaches_the_adapter(tmp_path):
    model = adapted()
    before = values(model)
    settings = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    trainer(model, tmp_path, **settings).train()
    assert not any(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


def test_the_best_checkpoint_comes_back(tmp_path):
    model = adapted()
    settings = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, metric_for_best_model="loss")
    run = trainer(model, tmp_path, **settings, greater_is_better=True)
    run.train()
    best = PeftModel.from_pretrained(models.build("gpt2"), run.state.best_model_checkpoint)
    assert run.state.best_model_checkpoint.endswith("checkpoint-3")
    assert all(torch.equal(a, b) for a, b in zip(values(best), values(model), strict=True))


def test_save_model_and_continue_from_disk(tmp_path):
    model = adapted()
    run = trainer(model, tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(models.build("gpt2"), tmp_path / "saved", is_trainable=True)
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    before = values(loaded)
    trainer(loaded.train(), tmp_path / "more").train()
    assert not any(torch.equal(a, b) for a, b in zip(before, values(loaded), strict=True))


def test_an_adapter_of_another_name_resumes(tmp_path):
    def named():
        torch.manual_seed(5)
        return get_peft_model(models.build("gpt2").train(), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1), "mine")

    whole, again = named(), named()
    trainer(whole, tmp_path / "whole").train()
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    one, two = (state_of(model.get_base_model()).parameters("mine") for model in (whole, again))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_classifier_head_is_trained_and_saved(tmp_path):
    torch.manual_seed(0)
    base = models.bert("ForSequenceClassification")
    model = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, r=4))
    head = base.classifier.adapters["default"].module.weight.detach().clone()
    trainer(model, tmp_path, rows=Rows(classes=True)).train()
    assert not torch.equal(base.classifier.adapters["default"].module.weight, head)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(models.bert("ForSequenceClassification"), tmp_path / "checkpoint-6")
    batch = {"input_ids": torch.arange(3, 11)[None]}
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_adalora_cuts_ranks_without_a_call_by_hand(tmp_path):
    torch.manual_seed(5)
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=2, tfinal=2, target_modules=["c_attn", "c_fc"])
    model = get_peft_model(models.build("gpt2").train(), config)
    trainer(model, tmp_path, max_steps=10).train()
    alive = [int((a.lora_E != 0).sum()) for a in state_of(model.get_base_model()).adapters("default").values()]
    assert sum(alive) == 2 * len(alive) and set(alive) != {2}


@pytest.mark.parametrize("case", [c for c in ONE_EACH if c.model not in models.CONVS], ids=str)
def test_every_method_trains_and_resumes(case: Case, tmp_path):
    def build():
        return case.build(moved=False).train()

    whole, again = build(), build()
    settings = dict(max_steps=4, save_steps=2)
    if case.facts:
        settings |= dict(rows=Rows(**case.facts_of(24)), remove_unused_columns=False)
    trainer(whole, tmp_path / "whole", **settings).train()
    resumed, checkpoint = trainer(again, tmp_path / "again", **settings), str(tmp_path / "whole" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(again), strict=True))


@pytest.mark.parametrize("order", ["trainer first", "veneer first"])
@pytest.mark.parametrize("reference", ["hidden", "present"])
def test_trainer_knows_the_model_whatever_is_imported_first(order: str, reference: str, tmp_path):
    """In a process of its own, with the reference library importable or not."""
    import subprocess
    import sys

    hide = """
import importlib.metadata, sys
class Hidden:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "peft" else self.finder.find_spec(name, path, target)
    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):
        found = getattr(self.finder, "find_distributions", None)
        return [d for d in found(context) if d.metadata["Name"] != "peft"] if found else []
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Hidden(f) for f in sys.meta_path]
"""
    first = ["from transformers import Trainer", "from veneer import get_peft_model"]
    script = "\n".join(
        [
            hide if reference == "hidden" else "",
            *(first if order == "trainer first" else first[::-1]),
            "from tests.test_trainer import adapted, trainer",
            "import os, importlib.util",
            f"assert (importlib.util.find_spec('peft') is None) == {reference == 'hidden'}",
            f"trainer(adapted(), {str(tmp_path)!r}, max_steps=3).train()",
            f"assert 'adapter_model.safetensors' in os.listdir({str(tmp_path / 'checkpoint-3')!r})",
        ]
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=room.SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
