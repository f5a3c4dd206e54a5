"""`PeftModel` and the operations on it: loading, verifying, combining, converting to LoRA, hot swapping.

Start with `peft_model.py`; `loading.py` loads a base model and its adapters by name, `guard.py` watches training.
"""
