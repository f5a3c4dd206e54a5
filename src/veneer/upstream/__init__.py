"""What veneer knows of the insides of other libraries, transformers above all, and of the versions that were tried.

Anything that moved between releases, or may, is looked up here: by the signature or the attribute that tells, never by
comparing version strings. Each look says which releases need it. A module here imports `errors` and `maths` alone, so
that every other package may use it. Start with `cache.py`; `versions.py` says what was tried.
"""
