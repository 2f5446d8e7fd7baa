"""geminifx: a declarative graph compiler that trains PyTorch models larger than the device.

model = geminifx.compile(model, device_budget="24GB")
loss = model(**batch).loss
loss.backward()
optimizer.step()
print(model.plan)
print(model.graph["training"])
"""

from torch import device as _device

from .compiler.api import compile
from .compiler.checkpoint import load_checkpoint, save_checkpoint
from .compiler.loader import shard_dataloader
from .compiler.module import CompiledModule
from .compiler.options import Options
from .compiler.pretrained import from_pretrained
from .passes.program.manager import graph_pass
from .passes.program.plan import Plan
from .runtime.isa.errors import (
    ArgumentError,
    BudgetError,
    CaptureError,
    CheckpointError,
    GeminiError,
    ShardingError,
    SplitError,
    StateError,
)
from .runtime.isa.schedule import Schedule
from .runtime.optimizer.lion import Lion

__version__ = "0.1.0"


def init_empty() -> _device:
    """A context in which models are built without memory: their weights are on `meta`, to be loaded later."""
    return _device("meta")


__all__ = [
    "ArgumentError", "BudgetError", "CaptureError", "CheckpointError", "CompiledModule", "GeminiError", "Lion",
    "Options", "Plan", "Schedule", "ShardingError", "SplitError", "StateError", "compile", "from_pretrained",
    "graph_pass", "init_empty", "load_checkpoint", "save_checkpoint", "shard_dataloader",
]  # fmt: skip
