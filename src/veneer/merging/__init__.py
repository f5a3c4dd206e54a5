"""Adapters merged into a base, or with each other, from files to files in bounded memory.

Start with `merge.py`; `mapped.py` binds weights from files while they are needed, `combine.py` sums adapters.
"""
