"""An adapter name that would write outside of the directory it is saved to."""

from _common import adapter, base, get_peft_model, refused

from veneer import LoraConfig

home = adapter()
outside = home.parent / "veneer-climbed"


def use():
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"]), "../veneer-climbed")
    model.save_pretrained(home)


refused(use, outside.exists)
