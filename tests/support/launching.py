"""Starts a script on several processes of this machine, which meet without a port that somebody else may take."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed as dist

FORKED = Path(__file__).with_name("forked.py")
THREADS = {"OMP_NUM_THREADS": "1"}
TIMEOUT_S = 1200
"""What several processes need, on a few busy cores."""


def torchrun(
    script: Path, *arguments: str, ranks: int = 2, options: Sequence[str] = ()
) -> "subprocess.CompletedProcess[str]":
    """Run a script as users do, with `options` for torchrun. `--standalone` lets its own store take any free port.

    Raises TimeoutExpired where it is not done in time.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, **THREADS}
    return subprocess.run(
        [*command, *options, str(script), *arguments],
        env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip


def forked(script: Path, *arguments: str, ranks: int = 2) -> "subprocess.CompletedProcess[str]":
    """Run a script on ranks that are forked from one process, which takes less than torchrun does: most of what a short
    one takes are imports. They see no GPU. Raises TimeoutExpired where it is not done in time."""
    command = [sys.executable, str(FORKED), str(ranks), str(script), *arguments]
    with _meeting(ranks, meeting_store()) as environment:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip


def meeting_store() -> dist.TCPStore:
    """What ranks meet at."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextmanager
def _meeting(ranks: int, store: dist.TCPStore, start: int = 0) -> Iterator[dict[str, str]]:
    """The environment of ranks that meet at a store which this process holds, as torchrun does. They see no GPU: where
    autograd has started its threads for one, no process can be forked that runs a backward."""
    yield {
        **os.environ, **THREADS, "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(start),
    }  # fmt: skip


Start = Callable[..., "subprocess.CompletedProcess[str]"]


def launched(script: Path, out: Path, *names: str, ranks: int, start: Start = forked) -> dict[str, Any]:
    """What the ranks that run `script OUT NAME...` wrote to OUT.

    They run once, also where they fail: every test that asks for it then fails at once, with what they printed.
    """
    found = _launched(script, out, *names, ranks=ranks, start=start)
    assert not isinstance(found, str), found
    return found


@cache
def _launched(script: Path, out: Path, *names: str, ranks: int, start: Start) -> dict[str, Any] | str:
    try:
        done = start(script, str(out), *names, ranks=ranks)
    except subprocess.TimeoutExpired as late:
        return f"{late}\n{(late.stderr or b'').decode()[-3000:]}"
    return torch.load(out) if done.returncode == 0 else done.stderr[-3000:]


def finder(script: Path, folder: Path, launches: Mapping[int, Sequence[tuple[str, ...]]],
           start: Start = forked) -> Callable[[str, int], Any]:  # fmt: skip
    """A function that tells what so many ranks found of a name; `launches` has those that are found together."""

    def found(name: str, ranks: int) -> Any:
        ((number, names),) = ((i, names) for i, names in enumerate(launches[ranks]) if name in names)
        out = folder / f"{ranks} ranks, {number}.pt"
        return launched(script, out, *names, ranks=ranks, start=start)[name]

    return found


def ranks_of(
    script: Path,
    *arguments: str,
    ranks: int = 2,
    timeout_s: float = 300,
    store: dist.TCPStore | None = None,
    start: int = 0,
) -> list[tuple[int, str]]:
    """Run a script on ranks that are forked from one process, and let each live on when another dies. Returns their
    exit codes and outputs. They see no GPU.

    This process holds the store that they meet at, as torchrun does, which keeps it for every `start`. Raises
    TimeoutExpired where one is not done in time; all of them are ended.
    """
    with _meeting(ranks, store or meeting_store(), start) as environment, TemporaryDirectory() as folder:
        command = [sys.executable, str(FORKED), "--apart", folder, str(ranks), str(script), *arguments]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        ) as parent:
            try:
                codes, _ = parent.communicate(timeout=timeout_s)
            finally:
                if parent.poll() is None:
                    os.killpg(parent.pid, signal.SIGKILL)
        assert parent.returncode == 0, f"{FORKED.name} itself failed"
        outputs = [(Path(folder) / str(rank)).read_text() for rank in range(ranks)]
    return list(zip(json.loads(codes), outputs, strict=True))
