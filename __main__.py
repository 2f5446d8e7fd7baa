"""`python -m geminifx`: the command, which also launches itself so in several processes."""

from .compiler.cli.launch import end, is_launched
from .compiler.cli.main import app

try:
    app(prog_name="geminifx")
except SystemExit as ended:
    if not is_launched():
        raise
    end(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
