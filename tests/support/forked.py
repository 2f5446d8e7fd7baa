"""Runs a script on several processes, which import once what all of them need.

`forked.py RANKS SCRIPT ARGUMENTS...` ends all of them where one fails. `forked.py --apart FOLDER RANKS SCRIPT
ARGUMENTS...` lets each live on; it writes what rank N prints to the file FOLDER/N, and prints a list of exit codes.

They are forked from this process, which has imported that, and done what the script's `prepare(ranks, arguments)` does,
if all end together and it has one: no thread runs, and no GPU is in use.
"""

import atexit
import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import lasting_imports
import more_models  # noqa: F401
import torch
import zoo  # noqa: F401
from torch.multiprocessing import get_context, start_processes

# Autograd starts a thread for each GPU at its first backward, after which no process that runs one can be forked. Fake
# tensors make it believe in one where torch is built for CUDA, so the first backward comes before them.
torch.ones((), requires_grad=True).backward()


def run(rank: int, script: str, arguments: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def run_apart(rank: int, folder: str, script: str, arguments: list[str]) -> None:
    with (Path(folder) / str(rank)).open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
    try:
        run(rank, script, arguments)
    finally:
        atexit._run_exitfuncs()  # as where a script ends by itself, which forked processes do not


def together(ranks: int, script: str, arguments: list[str]) -> None:
    prepare = runpy.run_path(script, run_name="prepared").get("prepare")
    if prepare is not None:
        prepare(ranks, arguments)
    lasting_imports.end()
    start_processes(run, (script, arguments), ranks, start_method="fork")


def apart(folder: str, ranks: int, script: str, arguments: list[str]) -> list[int | None]:
    lasting_imports.end()
    process = get_context("fork").Process
    started = [process(target=run_apart, args=(rank, folder, script, arguments)) for rank in range(ranks)]
    for one in started:
        one.start()
    for one in started:
        one.join()
    return [one.exitcode for one in started]


if __name__ == "__main__":
    if sys.argv[1] == "--apart":
        _, _, folder, ranks, script, *arguments = sys.argv
        sys.stdout.write(json.dumps(apart(folder, int(ranks), script, arguments)))
    else:
        _, ranks, script, *arguments = sys.argv
        together(int(ranks), script, arguments)
