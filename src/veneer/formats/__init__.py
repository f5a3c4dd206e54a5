"""The layouts of LoRA adapters on disk: one file each, with `is_here`, `read` and `write`."""
