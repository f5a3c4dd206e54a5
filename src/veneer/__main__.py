"""`python -m veneer` is the command `veneer`."""

from veneer.cli import main

main()
