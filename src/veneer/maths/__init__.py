"""Pure functions on tensors: no adapters, no models, no files.

Each module is one idea (a Cayley transform, a wavelet, a truncated SVD), with its source in the docstring.
"""
