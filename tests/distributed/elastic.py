"""One rank of `geminifx train` under torchrun: `elastic.py DEATHS LOSSES WORD...`.

DEATHS tells, for every start of the ranks, which of them is killed in which step, as `0:1@5,1:0@9`: of the first start
rank 1 in step 5. Rank 0 adds every step's loss to the file LOSSES.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from geminifx.compiler.cli.display import StepProgress
from geminifx.compiler.cli.launch import end
from geminifx.compiler.cli.main import app
from geminifx.models.recipe.recipe import StepInfo

RANK, START = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
deaths, losses, *words = sys.argv[1:]
shown = StepProgress.__call__


def show(progress: Any, info: StepInfo) -> None:
    shown(progress, info)
    if RANK == "0":
        with Path(losses).open("a") as file:
            print(info.step, info.loss.hex(), file=file)
    if f"{START}:{RANK}@{info.step}" in deaths.split(","):
        os.kill(os.getpid(), signal.SIGKILL)


StepProgress.__call__ = show
try:
    app(words, prog_name="geminifx")
except SystemExit as ended:
    end(int(ended.code or 0))
