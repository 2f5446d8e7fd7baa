"""Starts a script on several processes of this machine, which meet without a port that somebody else may take."""

import os
import subprocess
import sys
from pathlib import Path

from torch import distributed as dist

THREADS = {"OMP_NUM_THREADS": "1"}


def torchrun(script: Path, *arguments: str, ranks: int = 2) -> "subprocess.CompletedProcess[str]":
    """Run a script as users do. `--standalone` lets torchrun's own store take any port that is free."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, **THREADS}
    return subprocess.run(
        [*command, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def ranks_of(script: Path, *arguments: str, ranks: int = 2, timeout_s: float = 300) -> list[tuple[int, str]]:
    """Run a script on every rank, and let each live on when another dies. Returns their exit codes and outputs.

    This process holds the store that they meet at, as torchrun does. Raises TimeoutExpired where one is not done in
    time; all of them are ended.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks),
               "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    started = [
        subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True,
                         env={**os.environ, **THREADS, **meeting, "RANK": str(rank)})
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [one.communicate(timeout=timeout_s)[0] for one in started]
    finally:
        for one in started:
            one.kill()
    return [(one.returncode, output) for one, output in zip(started, outputs, strict=True)]
