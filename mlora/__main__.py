"""`python -m mlora`: the command `mlora`."""

from .cli import app

app()
