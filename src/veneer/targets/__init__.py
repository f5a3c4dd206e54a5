"""The base model as adapters see it: one `Target` for each kind of module, quantised weights, roles, paths.

Imports `ops`, `files`, `upstream`, `maths` and `errors` alone. Start with `target.py`; `roles.py` finds attention
and MLPs by structure, `quantised.py` holds a small class for each library.
"""
