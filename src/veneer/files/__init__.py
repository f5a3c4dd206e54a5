"""Finding files, reading them within limits, writing them atomically, and pulling models from the package index.

Everything that comes from outside passes through here, and nothing here trusts it. Imports only `upstream`, `maths`
and `errors`. Start with `read.py` and `write.py`; `limits.py`, `confine.py` and `regex.py` guard against hostile files.
"""
