"""`python -m emoe` is the command `emoe`."""

from emoe.cli import run

run()
