"""Example flows of PEFT's clients, each a program of its own that runs from start to a saved and reloaded result."""
