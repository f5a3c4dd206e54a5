"""An adapter's file that brings base embeddings: loaded second, it would change the base under the first."""

import torch
from _common import adapter, base, get_peft_model, refused

from veneer import LoraConfig, PeftModel

other = base()
with torch.no_grad():
    other.get_input_embeddings().weight += 1
hostile = adapter()
get_peft_model(other, LoraConfig(r=4, target_modules=["embed_tokens"])).save_pretrained(hostile)
model = PeftModel.from_pretrained(base(), adapter())
before = model.get_input_embeddings().weight.clone()
refused(
    lambda: model.load_adapter(hostile, "second", check_base=False),
    lambda: not torch.equal(before, model.get_input_embeddings().weight),
)
