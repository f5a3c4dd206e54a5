"""A config whose rank would need terabytes, for LoRA and for a method that draws its own matrices (VeRA)."""

from _common import VeneerError, adapter, base, get_peft_model, limit_memory, load, reconfigure, refused
from safetensors.torch import load_file, save_file

from veneer import VeraConfig

lora, vera = adapter(), adapter()
get_peft_model(base(), VeraConfig(r=4, target_modules=["q_proj"])).save_pretrained(vera)
for home in (lora, vera):
    reconfigure(home, r=10**9)
    save_file(load_file(home / "adapter_model.safetensors"), home / "adapter_model.safetensors")
limit_memory()


def use():
    try:
        load(lora)
    except VeneerError:
        load(vera)


refused(use)
