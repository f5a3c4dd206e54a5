"""veneer on every architecture of transformers that generates text; see `__main__`."""
