"""TRL's SFTTrainer with peft_config, and with a ready PeftModel."""

from .common import adapters, close, folder, language_model, moved, sentence, torch

from datasets import Dataset  # isort: skip
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

path = language_model()
tokenizer = AutoTokenizer.from_pretrained(path)
data = Dataset.from_list([{"text": sentence(i)} for i in range(12)])
settings = dict(
    per_device_train_batch_size=4, report_to="none", learning_rate=1e-2, max_steps=3, use_cpu=True, bf16=False
)
x = torch.randint(3, 40, (2, 7))
for ready in (False, True):
    out = str(folder() / f"out{ready}")
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    model = AutoModelForCausalLM.from_pretrained(path)
    model = get_peft_model(model, config) if ready else model
    arguments = SFTConfig(out, **settings)
    trainer = SFTTrainer(
        model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=None if ready else config
    )
    assert isinstance(trainer.model, PeftModel)
    before = adapters(trainer.model)
    trainer.train()
    assert moved(before, trainer.model)
    trainer.save_model(out)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), out)
    assert close(again(x).logits, trainer.model.eval()(x).logits)
print("done")
