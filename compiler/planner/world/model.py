"""A whole model as its blocks, each with the costs of the captured block that stands for it."""

from dataclasses import dataclass, field
from functools import cached_property
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ....models.adapters import blocks
from ....passes.canonicalize import canonicalize
from ....passes.program.plan import Plan
from ....passes.splitting.stages import is_number
from ....runtime.isa.errors import CaptureError
from ...capture.microbatches import Arguments, examples, typed
from ...capture.results import logits_bytes
from ...capture.trace import Captured, CaptureRequest, capture
from ...rates.rates import Rates
from ..pipeline.cuts import balanced
from ..shortened import Shortened
from .units import Unit, Units, measured


@dataclass(frozen=True)
class Model:
    """What each block of a model takes, with what goes beside it, in the model's order.

    Fields:
        units: the costs of the blocks that were captured, and of what goes beside them.
        shortened: which captured block stands for each of the model's.
        heads: the greatest common divisor of the numbers of attention heads and key-value heads; 0 where it is unknown.
        makes_its_loss: whether every differentiable output is a single number, as a pipeline needs it.
        input_bytes: bytes of the captured call's tensors.
    """

    units: Units
    shortened: Shortened
    heads: int = 0
    makes_its_loss: bool = True
    input_bytes: int = 0
    _cuts: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, arguments: Arguments, request: CaptureRequest) -> "Model":
        """Captures one step of the model, with only some of its equal blocks left in, or whole where it does not run
        so. Raises CaptureError where the step has no backward."""
        names, given = blocks(model), typed(arguments)
        short = Shortened.of(model, names)
        try:
            with short.applied(model):
                captured = _captured(model, given, request)
        except Exception:  # the model depends on the number of its blocks, or on one that was left out
            short = Shortened.not_at_all(names)
            captured = _captured(model, given, request)
        if not captured.trains:
            raise CaptureError(
                "no parameter requires a gradient, so there is no training step to plan for several processes"
            )
        saved, program = logits_bytes(captured.program), captured.program.copy()
        canonicalize.rewrite(program, Plan())
        units = measured(program, short.left, examples(given), saved)
        return cls(units, short, _heads(model), _makes_its_loss(captured), _num_bytes(given))

    @cached_property
    def parts(self) -> tuple[tuple[Unit, ...], ...]:
        """The units of each block: its own, and, where the model begins or a list ends, the one beside it."""
        units, stands_for = self.units, self.shortened.stands_for or ("",)
        last = {name: i for i, name in enumerate(stands_for)}
        place = {0 if name == stands_for[0] else last[name]: name for name in last}
        return tuple(
            (units.of_block[name], *([units.beside[place[i]]] if i in place else []))
            for i, name in enumerate(stands_for)
        )

    def cuts(self, stages: int, rates: Rates) -> tuple[int, ...]:
        """The first block of each of `stages` stages, cut so that the slowest takes as little as possible."""
        key = stages, rates.name
        if key not in self._cuts:
            seconds = [sum(_seconds(unit, rates) for unit in part) for part in self.parts]
            self._cuts[key] = tuple(balanced(seconds, stages))
        return self._cuts[key]

    def numel(self, begin: int, end: int) -> int:
        """Elements of the parameters of blocks `begin` to `end`; parameters that several of them share count once."""
        parts = self.parts[begin:end]
        shared = {name: numel for part in parts for unit in part[1:] for name, numel in unit.parameters.items()}
        return sum(part[0].numel for part in parts) + sum(shared.values())

    def trained_numel(self, begin: int, end: int) -> int:
        """As `numel`, for trained parameters only."""
        parts = self.parts[begin:end]
        shared = {name: numel for part in parts for unit in part[1:] for name, numel in unit.trained.items()}
        return sum(part[0].trained_numel for part in parts) + sum(shared.values())


def _captured(model: nn.Module, arguments: Arguments, request: CaptureRequest) -> Captured:
    with torch.inference_mode(False), torch.enable_grad():
        return capture(model, *arguments, request)


def _makes_its_loss(captured: Captured) -> bool:
    outputs = captured.program.results_of("output")
    return all(is_number(outputs[str(i)]) for i in captured.differentiable)


def _num_bytes(arguments: Arguments) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor))


def _seconds(unit: Unit, rates: Rates) -> float:
    return sum(
        count * operator.seconds(rates, 1, 1, 1) for work in unit.work.values() for operator, count in work.items()
    )


def _heads(model: nn.Module) -> int:
    """The greatest common divisor of the configuration's numbers of attention heads and key-value heads."""
    found = [getattr(_config(model), name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    return gcd(*(count for count in found if isinstance(count, int)))


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config if config is None or not hasattr(config, "get_text_config") else config.get_text_config()


def resized(arguments: Arguments, size: int) -> Arguments:
    """A call's arguments as meta tensors, with `size` examples."""
    before = examples(arguments)

    def of(tensor: Tensor) -> Tensor:
        rest = tensor.shape[1:] if tensor.dim() and tensor.shape[0] == before else None
        shape = tensor.shape if rest is None else (size, *rest)
        made = torch.empty(shape, dtype=tensor.dtype, device="meta")
        return made.requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(Tensor, of, arguments)
