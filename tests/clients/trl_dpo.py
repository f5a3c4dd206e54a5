"""TRL's DPOTrainer with peft_config: the reference is the model with its adapter off."""

from .common import adapters, close, folder, language_model, moved, sentence, torch

from datasets import Dataset  # isort: skip
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

path = language_model()
tokenizer = AutoTokenizer.from_pretrained(path)
rows = [{"prompt": sentence(i), "chosen": sentence(i + 1), "rejected": sentence(i + 2)} for i in range(8)]
settings = dict(
    per_device_train_batch_size=4, report_to="none", learning_rate=1e-2, max_steps=3, use_cpu=True, bf16=False
)
trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(path),
    args=DPOConfig(str(folder() / "out"), **settings),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
)
before = adapters(trainer.model)
trainer.train()
assert moved(before, trainer.model)
trainer.save_model(str(folder() / "out"))
x = torch.randint(3, 40, (2, 7))
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), str(folder() / "out"))
assert close(again(x).logits, trainer.model.eval()(x).logits)
print("done")
