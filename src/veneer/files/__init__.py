"""Files of all kinds: found, read with limits, written atomically, pulled from the package index.

Everything that comes from outside passes through here, and nothing here trusts it. Imports `upstream`, `maths` and
`errors` alone. Start with `read.py` and `write.py`; `limits.py`, `confine.py` and `regex.py` are the guards.
"""
