"""GGUF, the file format of llama.cpp and Ollama: LoRA adapters and whole models.

Start reading with `architectures.py`, the table of what llama.cpp computes for each architecture. `tensors.py` gives
the tensors their names and layouts, in both directions.

Writing: `metadata.py` and `vocabulary.py` translate config and tokenizer, `file.py` writes the files one tensor at a
time, and `modelfile.py` describes a model for Ollama. Reading: `reader.py` opens a file, `config.py` and `tokenizer.py`
are the inverse of the translations, `directory.py` writes the model as a directory of transformers, and `cache.py` does
so once for each file.
"""
