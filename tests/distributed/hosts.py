"""One rank on a host of two, or, with `apart`, on one of its own: tells what it may hold there, and on how many cores
it updates."""

import os
import platform
import sys

import geminifx
from geminifx.runtime.distributed import meeting
from geminifx.runtime.optimizer import updates
from torch import nn

if sys.argv[1] == "apart":
    name, _ = meeting.this_host()
    platform.node = lambda: f"{name}, {os.environ['RANK']}"
updates.cores = lambda: set(range(16))
model = geminifx.compile(nn.Linear(4, 4), device="cpu", host_budget="8GB")
sys.stdout.write(f"{model.session.limits.host_bytes} {updates.host_threads(model.ranks.on_this_host)}\n")
