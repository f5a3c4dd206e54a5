"""Adapters on a model: wrapping modules, the order in which adapters compose, saving, loading, switching.

Names no method, and imports nothing that stands above it: `targets`, `ops`, `files`, `upstream`, `maths`, `errors`.
Start with `adapter.py` (what a method defines), then `layer.py` (the one wrapper) and `attach.py`.
"""
