"""TRL's GRPOTrainer with peft_config and a reference of the model with its adapter off."""

from .common import adapters, close, folder, language_model, moved, sentence, torch

from datasets import Dataset  # isort: skip
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

path = language_model()
tokenizer = AutoTokenizer.from_pretrained(path)
rows = [{"prompt": sentence(i)} for i in range(8)]
settings = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=6, beta=0.1, max_steps=2)
settings |= dict(report_to="none", learning_rate=1e-2, use_cpu=True, bf16=False)
trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(path),
    reward_funcs=lambda completions, **other: [float(hash(text) % 7) for text in completions],
    args=GRPOConfig(str(folder() / "out"), **settings),
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
