"""accelerate: a loop of one's own with prepare, save_state and load_state, and the FSDP helpers."""

from .common import adapters, close, folder, language_model, moved, torch

from accelerate import Accelerator  # isort: skip
from accelerate.utils.modeling import is_peft_model
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

path = language_model()
accelerator = Accelerator(cpu=True)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(r=4, task_type="CAUSAL_LM"))
assert is_peft_model(model)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
rows = torch.randint(3, 40, (16, 7))
loader = torch.utils.data.DataLoader(rows, batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
before = adapters(model)


def epoch():
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


epoch()
assert moved(before, model)
accelerator.save_state(str(folder() / "state"))
kept = adapters(model)
epoch()
assert moved(kept, model)
accelerator.load_state(str(folder() / "state"))
assert not moved(kept, model)

plain = accelerator.unwrap_model(model)
plain.save_pretrained(str(folder() / "adapter"), state_dict=accelerator.get_state_dict(model))
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), str(folder() / "adapter"))
assert close(again(rows[:2]).logits, plain.eval()(rows[:2]).logits)
other = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(r=4, task_type="CAUSAL_LM"))
set_peft_model_state_dict(other, get_peft_model_state_dict(plain))
assert close(other.eval()(rows[:2]).logits, plain(rows[:2]).logits)

policy = fsdp_auto_wrap_policy(plain)
units = [m for m in plain.modules() if policy(module=m, recurse=False, nonwrapped_numel=0)]
assert units and all(isinstance(m, LlamaDecoderLayer) for m in units)
print("done")
