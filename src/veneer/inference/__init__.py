"""Using trained adapters: answers of the base model and its adapters, streamed or in batches, and their evaluation.

Imports `model`, `core`, `data` and `errors`. Start with `generation.py`; `evaluation.py` compares adapters with their
base on data.
"""
