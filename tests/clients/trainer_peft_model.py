"""Trainer with a PeftModel: train, checkpoint, resume, reload, merge; a pipeline of it."""

from .common import adapters, close, folder, language_model, moved, tokenizer, torch

from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model  # isort: skip
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

path = language_model()
rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in torch.randint(3, 40, (16, 7))]
x = torch.randint(3, 40, (2, 7))


def trainer():
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(task_type="CAUSAL_LM", r=4))
    settings = dict(per_device_train_batch_size=4, report_to="none", learning_rate=1e-2, save_steps=2, use_cpu=True)
    return Trainer(model, TrainingArguments(str(folder() / "out"), max_steps=4, **settings), train_dataset=rows)


first = trainer()
assert isinstance(first.model, PeftModelForCausalLM) and type(first.model).__name__ == "PeftModelForCausalLM"
before = adapters(first.model)
first.train()
assert moved(before, first.model)
checkpoint = folder() / "out" / "checkpoint-2"
assert not (checkpoint / "model.safetensors").exists()
wanted = first.model.eval()(x).logits

second = trainer()
second.train(resume_from_checkpoint=str(checkpoint))
assert close(second.model.eval()(x).logits, wanted)

last = str(folder() / "out" / "checkpoint-4")
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), last)
assert close(again(x).logits, wanted)
assert close(AutoPeftModelForCausalLM.from_pretrained(last)(x).logits, wanted)
generate = pipeline("text-generation", model=again, tokenizer=tokenizer(), device="cpu")
assert generate("w1 w2", max_new_tokens=3)[0]["generated_text"].startswith("w1")
merged = again.merge_and_unload()
assert close(merged(x).logits, wanted)
print("done")
