"""From a data file to batches of tokens: sources, shapes of rows, chat templates, encoding, packing, collation.

Knows nothing of adapters or of training runs. Start with `prepare.py`, which puts the steps in order.
"""
