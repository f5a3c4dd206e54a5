"""The base model as adapters see it: a `Target` view per kind of module, quantised weights, roles and paths.

Imports only `ops`, `files`, `upstream`, `maths` and `errors`. Start with `target.py`; `roles.py` finds attention and
MLPs by structure, and `quantised.py` has a small class per quantisation library.
"""
