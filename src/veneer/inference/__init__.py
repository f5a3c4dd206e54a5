"""Generating answers with a base model and its adapters, streamed or in batches, and evaluating them.

Imports `model`, `core`, `data` and `errors`. Start with `generation.py`; `evaluation.py` compares adapters with their
base on data.
"""
