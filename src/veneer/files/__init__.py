"""Finding files, reading them within limits, writing them atomically, and pulling models from the package index.

`gguf/` reads and writes GGUF, llama.cpp's file format.

All files from other authors are read here, and their content is never trusted. Imports only `upstream`, `maths` and
`errors`. Start with `read.py` and `write.py`; `limits.py`, `confine.py` and `regex.py` guard against hostile files.
"""
