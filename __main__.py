"""`python -m geminifx`: the command, which also launches itself so in several processes."""

from .compiler.cli.main import app

app(prog_name="geminifx")
