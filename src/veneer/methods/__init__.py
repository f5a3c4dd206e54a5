"""The methods, one file each: formula, adapter class and config. A file is named after its `peft_type`, in lower case.

A method imports only `core` and the packages below it, never `model` or `train`. Start with `ia3.py` or `lora.py`. Code
that several methods share is in `families/`; the initialisations of LoRA's weights are in `inits/`.
"""
