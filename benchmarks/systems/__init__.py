"""The systems that `step_time.py` compares, by name: one small class each."""

from .base import Contestant
from .deepspeed import DeepSpeed
from .fsdp2 import Fsdp2
from .ours import Ours, OursClip, OursDefault, OursTorch
from .roundpipe import RoundPipe, RoundPipeSync
from .torch_alone import Compiled, EagerBf16, Plain

SYSTEMS: dict[str, type[Contestant]] = {
    "ours": Ours,
    "ours-default": OursDefault,
    "ours-clip": OursClip,
    "ours-torch": OursTorch,
    "fsdp2": Fsdp2,
    "deepspeed": DeepSpeed,
    "roundpipe": RoundPipe,
    "roundpipe-sync": RoundPipeSync,
    "plain": Plain,
    "eager-bf16": EagerBf16,
    "compile": Compiled,
}

__all__ = ["SYSTEMS", "Contestant"]
