"""The methods, one file each, named as their `peft_type` in lower case: formula, adapter, config.

A method imports `core` and what lies below it, never a model or a training run. Start with `ia3.py` or `lora.py`;
parts that several methods share are in `families/`, starts of LoRA's weights in `inits/`.
"""
