"""Adapters on a model: wrapping modules, composing adapters, saving, loading and switching them.

Refers to no particular method, and imports only `targets`, `ops`, `files`, `upstream`, `maths` and `errors`. Start with
`adapter.py` (the base classes of methods), then `layer.py` (the only wrapper) and `attach.py`.
"""
