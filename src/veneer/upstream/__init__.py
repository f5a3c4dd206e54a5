"""Access to the internals of other libraries, above all transformers, and the versions that veneer was tested with.

Everything that differs between releases, or may, is looked up here: by signature or attribute, never by comparing
version strings. Each module says which releases need it. Imports only `errors` and `maths`, so that all other packages
can use it. Start with `cache.py`; `versions.py` lists the tested versions.
"""
