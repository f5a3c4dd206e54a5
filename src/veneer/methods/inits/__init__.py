"""Starts of LoRA's weights, one file each, and the passes over data that some of them need first.

Start with `start.py`, which chooses by the config's `init_lora_weights`.
"""
