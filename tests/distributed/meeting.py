"""One rank that meets the others, tells who they are, and dies. Rank 1 comes when rank 0 already looks for it."""

import os
import sys
import time
from datetime import timedelta

import torch
from geminifx.runtime.distributed.ranks import Ranks
from geminifx.runtime.isa.mesh import Axis, Mesh
from torch import distributed as dist

RANK, COMES = int(os.environ["RANK"]), f"rank 0 comes in start {os.environ['TORCHELASTIC_RESTART_COUNT']}"

store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
if RANK == 0:
    store.set(COMES, "")
else:
    store.wait([COMES], timedelta(minutes=5))
    time.sleep(0.5)
ranks = Ranks.of(lambda launched: Mesh((Axis("data", launched, "data"),)), torch.device("cpu"), timeout_s=30)
sys.stdout.write(f"{ranks.gather(RANK)}\n")
sys.stdout.flush()
os._exit(7)
