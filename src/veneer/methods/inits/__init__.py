"""Initialisations of LoRA's weights, one file each, and the passes over data that some of them need first.

Start with `start.py`, which selects an initialisation by the config's `init_lora_weights`.
"""
