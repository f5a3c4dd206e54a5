"""File layouts of LoRA adapters, one module per layout, with `is_here`, `read` and `write`.

Start reading with `conversion.py`, then `lora.py`: what each layout is read into and written from. GGUF, which also
holds whole models, is in `files/gguf`.
"""
