"""Initialisations of LoRA's weights, one file each, and the passes over data that some of them need first.

Start with `start.py`, which chooses one by the config's `init_lora_weights`.
"""
