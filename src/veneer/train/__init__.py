"""A training run from a recipe to a verified adapter.

Start with `run.py`, the whole run in order; `recipe.py` holds the settings, `trainer.py` our `Trainer`.
"""
