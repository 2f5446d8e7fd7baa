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
from .compiler.pretrained import from_pretrained
from .passes.program.manager import graph_pass
from .passes.program.plan import Plan
from .runtime.isa.errors import BudgetError, CaptureError, CheckpointError, GeminiError
from .runtime.optimizer.lion import Lion

__version__ = "0.1.0"


def init_empty() -> _device:
    """A context in which models are built without memory: their weights are on `meta`, to be loaded later."""
    return _device("meta")


__all__ = [
    "BudgetError", "CaptureError", "CheckpointError", "CompiledModule", "GeminiError", "Lion", "Plan", "compile",
    "from_pretrained", "graph_pass", "init_empty", "load_checkpoint", "save_checkpoint", "shard_dataloader",
]  # fmt: skip
