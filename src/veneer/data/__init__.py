"""From a data file to batches of tokens: sources, row shapes, chat templates, encoding, packing and collation.

Imports only `ops`, `targets` and `errors`: it is independent of adapters and of training runs. Start with `prepare.py`,
which runs the steps in order.
"""
