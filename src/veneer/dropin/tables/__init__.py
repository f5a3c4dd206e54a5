"""PEFT's names, defaults, refusals and wording as data, from which the drop-in is made.

Start with `methods.py`, which has a row per method, and `modules.py`, which has a list of names per module.
"""
