"""GGUF, the file format of llama.cpp and Ollama: LoRA adapters and whole models.

Start reading with `architectures.py`, the table of what llama.cpp computes for each architecture. `tensors.py` gives
the tensors their names and layouts, `vocabulary.py` translates tokenizers, `file.py` writes the files one tensor at a
time, and `modelfile.py` describes a model for Ollama.
"""
