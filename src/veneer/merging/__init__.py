"""Merging adapters into a base model, or combining them into one adapter, from files to files with limited memory.

Start reading with `merge.py`. `mapped.py` binds weights from files while they are needed, `merger.py` folds adapters
into new files, `combine.py` computes weighted sums of adapters, `export.py` writes GGUF files.
"""
