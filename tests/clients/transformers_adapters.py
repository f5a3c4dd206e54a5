"""transformers' own adapters: add_adapter, set_adapter, disable, Trainer, save, load_adapter, from_pretrained."""

from .common import adapters, close, folder, language_model, moved, torch

from peft import LoraConfig  # isort: skip
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

path = language_model()
model = AutoModelForCausalLM.from_pretrained(path)
x = torch.randint(3, 40, (2, 7))
base = model(x).logits

model.add_adapter(LoraConfig(r=4, init_lora_weights=False), adapter_name="a")
model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["k_proj"]), adapter_name="b")
assert model.active_adapters() == ["b"]
outputs = {}
for names in ("a", "b", ["a", "b"]):
    model.set_adapter(names)
    outputs[str(names)] = model(x).logits.detach()
assert len({round(float(y.sum()), 4) for y in (*outputs.values(), base)}) == 4
model.disable_adapters()
assert torch.equal(model(x).logits, base)
model.enable_adapters()

model.set_adapter("a")
before = adapters(model)
rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in torch.randint(3, 40, (8, 7))]
settings = dict(per_device_train_batch_size=4, report_to="none", learning_rate=1e-2, use_cpu=True)
trainer = Trainer(model, TrainingArguments(str(folder() / "out"), max_steps=3, **settings), train_dataset=rows)
trainer.train()
assert moved(before, model)
assert torch.equal(
    before["model.layers.0.self_attn.k_proj.lora_A.b.weight"],
    adapters(model)["model.layers.0.self_attn.k_proj.lora_A.b.weight"],
)
wanted = model.eval()(x).logits.detach()

model.save_pretrained(folder() / "adapter")
loaded = AutoModelForCausalLM.from_pretrained(path)
loaded.load_adapter(str(folder() / "adapter"), adapter_name="again")
assert close(loaded(x).logits, wanted)
loaded.delete_adapter("again")
assert torch.equal(loaded(x).logits, base)
assert close(AutoModelForCausalLM.from_pretrained(folder() / "adapter")(x).logits, wanted)
print("done")
