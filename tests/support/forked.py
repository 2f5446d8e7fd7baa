"""`forked.py RANKS SCRIPT ARGUMENTS...` runs a script on so many processes, which import once what all of them need.

They are forked from this one, which has imported that and done nothing else: no thread runs, and no GPU is in use.
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import lasting_imports
import more_models  # noqa: F401
import zoo  # noqa: F401
from torch.multiprocessing import start_processes


def run(rank: int, script: str, arguments: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    lasting_imports.end()
    start_processes(run, (sys.argv[2], sys.argv[3:]), int(sys.argv[1]), start_method="fork")
