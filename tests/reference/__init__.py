"""PEFT's own tests as a measure of the drop-in: `python -m tests.reference`, or `make reference`."""
