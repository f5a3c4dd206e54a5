"""`PeftModel`, and what is done to one: loading, verifying, combining, converting to LoRA, hot swapping.

Start with `peft_model.py`; `loading.py` builds a base and its adapters from names, `guard.py` watches training.
"""
