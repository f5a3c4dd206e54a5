"""What a trained adapter does: answers of base and adapters, streamed or in batches, and their evaluation.

Start with `generation.py`; `evaluation.py` compares an adapter with its base on data.
"""
