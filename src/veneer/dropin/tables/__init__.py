"""PEFT's names, defaults, refusals and wording, as data that the drop-in is made from.

Start with `methods.py` (a row for each method) and `modules.py` (a list of names for each module).
"""
