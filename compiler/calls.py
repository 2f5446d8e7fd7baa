"""Calls of a compiled model and of its submodules. Each runs as a step of a program, except `generate`."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..runtime import chosen_gradients
from ..runtime.executor import NoGradient, Step, TrainingRun
from ..runtime.isa import torch_private as private
from ..runtime.isa.errors import StateError
from .adaptation.adaptation import Adaptation
from .capture.results import AbsentOutput
from .capture.trace import rebuild_result
from .facade import Facade
from .programs.forward import Forward
from .programs.programs import Compiled
from .session import Session
from .state.streamed_weights import streamed_weights
from .weights.values import on_device


class Calls:
    """Carries out the calls of all facades of one model. Facades hold this object; it holds them only weakly."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.adaptation = Adaptation(session)
        self._anchor = torch.zeros((), requires_grad=True)
        self._facades: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
        chosen_gradients.refuse_them()

    def facade(self, module: nn.Module) -> nn.Module:
        """The facade of a module; a module that is not part of the model is returned as it is."""
        if id(module) in self._facades or id(module) in self.session.census.now().identities:
            return self.part(module)
        return module

    def part(self, module: nn.Module) -> nn.Module:
        """The facade of one of the model's modules."""
        found = self._facades.get(id(module))
        if found is None:
            found = self._facades[id(module)] = Facade(module, self)
        return found

    def run(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the forward of the model, or of one of its modules alone, as a compiled step."""
        session = self.session
        if private.is_transformed():
            raise StateError(
                "the compiled model was called within a transform of torch.func (grad, vmap, jvp, ...), which cannot "
                "look into a program; transform the plain model, or use backward()"
            )
        if private.tangents_are_on():
            _refuse_tangents(args, kwargs)
        with forward.in_source():
            compiled = session.program(args, kwargs, self._name_of(module), makes_room=self.adaptation.makes_room)
        backward = compiled.program.name == "training"
        session.ready(backward)
        self.adaptation.before(compiled)
        inputs = session.inputs(compiled, args, kwargs)
        session.begin_step(backward)
        outputs: list[Any]
        if backward:
            # A forward uses its inputs up; one that has to run again needs new ones.
            train = lambda: self._train(compiled, inputs or session.inputs(compiled, args, kwargs))  # noqa: E731
            outputs = self.adaptation.forward(compiled, (args, kwargs), train)
        else:
            results = compiled.executor.evaluate(inputs)
            outputs = [results[f"output:{i}"] for i in range(len(results))]
        for i in compiled.absent:
            outputs[i] = AbsentOutput()
        return rebuild_result(compiled.captured, outputs)

    def _name_of(self, module: nn.Module) -> str:
        """The module's name in the model. Raises StateError if it is no longer part of the model."""
        if module is self.session.source:
            return ""
        found = (name for name, each in self.session.census.now().modules.items() if each is module)
        name = next(found, None)
        if name is not None:
            return name
        raise StateError(f"{type(module).__name__} was called, but it is no longer part of the compiled model")

    def _train(self, compiled: Compiled, inputs: list[Any]) -> list[Any]:
        code, captured = compiled.executor.code, compiled.captured
        by_role = dict(zip(code.inputs, inputs, strict=True))
        tracked = [by_role[role.removeprefix("gradient:")] for role in code.input_gradients]
        run = TrainingRun(compiled.executor, inputs, compiled.outlets)
        inputs.clear()
        outputs: list[Any] = list(Step.apply(run, self._anchor, *tracked))
        for i in captured.detached:
            outputs[i] = NoGradient.apply(self._anchor, outputs[i])
        return outputs

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Warns of a move to a device other than the programs'. Raises StateError if `fn` does more than move."""
        device = self.session.device.torch_device
        probe = torch.zeros(1, device=device)
        dtype, is_shared = probe.dtype, probe.is_shared()
        found = fn(probe)
        if found.dtype != dtype or found.is_meta or (found.is_shared() != is_shared and found.device == device):
            raise StateError(
                "this would take parameters out of their chunks or change their dtype (.half(), .to(dtype), "
                ".share_memory()); masters stay float32, and compile(precision=) chooses the dtype of computation"
            )
        if found.device.type != device.type:
            warnings.warn(
                f".to({found.device}) leaves a compiled model where it is: its plan decides what lies on {device} and "
                "what on the host; compile(device=) chooses the device",
                stacklevel=5,
            )

    @contextmanager
    def lending(self) -> Iterator[None]:
        """Within, the module's own methods may write to parameters, as one that merges adapters does."""
        setup = self.session.setup
        with nullcontext() if setup is None else setup.machine.store.writable():
            yield

    def generate(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a module's `generate` in plain Python, with streamed weights: compiled, each token would need a program
        of its own."""
        device, dtype = self.session.device.torch_device, self.session.dtype
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: on_device(tensor, device, dtype), (args, kwargs))
        with streamed_weights(self.session):
            return method(*args, **kwargs)


def _refuse_tangents(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises StateError if an argument carries a tangent, which a program would lose."""
    if any(isinstance(leaf, Tensor) and private.has_tangent(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
        raise StateError(
            "the compiled model was called with a dual tensor, but a program computes no derivatives in forward mode; "
            "call the plain model there, or use backward()"
        )
