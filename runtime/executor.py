"""Runs generated programs, and joins them to autograd so that they fit into any training loop.

A program's text is compiled by Python once and run as it stands: there is no dispatch per node. A training
program is a generator that sleeps between forward and backward; its local variables are what the backward
needs, and they die as it goes, or with the graph when no backward comes.
"""

import linecache
import math
import operator
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .distributed.ranks import NOTHING, Exchanges
from .isa.errors import BudgetError, GeminiError, StateError, as_cause
from .isa.instructions import INSTRUCTIONS
from .isa.operators import OPERATORS
from .isa.torch_private import will_accumulate
from .kernels.fused import kernel_of
from .machine import Machine
from .memory.state_store import Run
from .memory.tiers import MemoryMeter

_numbers = count()


@dataclass(frozen=True)
class Code:
    """A generated program ready to be loaded.

    `inputs` are the roles of the function's parameters in order; `namespaces` the operator libraries that
    the text names; `reduces` the chunks that the backward reduces; `turns` the strides of what comes in at each turn,
    such as the gradients of outputs; `input_gradients` the roles returned.
    """

    name: str
    source: str
    inputs: tuple[str, ...]
    namespaces: frozenset[str]
    reduces: frozenset[int] = frozenset()
    turns: tuple[tuple[tuple[int, ...], ...], ...] = ()
    input_gradients: tuple[str, ...] = ()


def called_by_programs(machine: Machine) -> SimpleNamespace:
    """What programs call as `geminifx`: the machine's instructions, and compute operators, which are torch's to run."""
    instructions = {name: getattr(machine, name) for name in INSTRUCTIONS}
    return SimpleNamespace(**instructions, **OPERATORS, fused=kernel_of(machine.device))


class Loaded:
    """Python's function for a program; tracebacks through it show the program's lines.

    The function's globals hold it and those that it calls, each of which holds the globals: here they are let go.
    """

    def __init__(self, code: Code, called: SimpleNamespace, device: torch.device) -> None:
        self.filename = f"<geminifx {code.name} {next(_numbers)}>"
        self.world: dict[str, Any] = {
            "torch": torch, "operator": operator, "inf": math.inf, "nan": math.nan, "DEVICE": device,
            **{name: getattr(torch.ops, name) for name in code.namespaces}, "geminifx": called,
        }  # fmt: skip
        lines = code.source.splitlines(keepends=True)
        linecache.cache[self.filename] = (len(code.source), None, lines, self.filename)
        exec(compile(code.source, self.filename, "exec"), self.world)
        self.function: Callable[..., Any] = self.world[code.name]

    def __del__(self) -> None:
        linecache.cache.pop(self.filename, None)
        self.world.clear()


class Executor:
    """Runs one program on a machine; `exchanges` is what that exchanges with other processes."""

    def __init__(self, code: Code, machine: Machine, meter: MemoryMeter | None,
                 exchanges: Exchanges = NOTHING) -> None:  # fmt: skip
        self.code = code
        self.exchanges = exchanges
        self.machine = machine
        self.meter = meter
        self.called = called_by_programs(machine)
        self.loaded = Loaded(code, self.called, machine.device)

    def evaluate(self, inputs: list[Any]) -> dict[str, Tensor]:
        """Run a program without a backward; returns its results by role. Inputs are tensors and numbers."""
        with self.resume(Run(), _bytes_of(inputs)):
            return self.loaded.function(*inputs)

    @contextmanager
    def resume(self, run: Run, input_bytes: int) -> Iterator[None]:
        """While a program runs: no autograd and no autocast, its run is the machine's, its tensors are metered."""
        machine = self.machine
        try:
            with torch.no_grad(), torch.autocast(machine.device.type, enabled=False), self._metered(input_bytes):
                machine.run = run
                machine.ranks.begin(*self._told(run))
                machine.messages.begin()
                try:
                    yield
                finally:
                    machine.ranks.end()
            machine.store.rest()
        except BaseException as error:
            left = machine.abort()
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise BudgetError(
                    f"the device budget ran out while '{self.code.name}' ran: {error}. {left} Make the batch smaller, "
                    "raise device_budget, or use placement='cpu'.",
                    tier="device",
                ) from as_cause(error)
            raise

    def _exchanges_now(self) -> Exchanges:
        """With which of the divided chunks are whole on the device: those are not gathered."""
        stays = [chunk.resident is not None for chunk in self.machine.chunks if chunk.layout.shards > 1]
        if not stays or not self.exchanges.between:
            return self.exchanges
        return replace(self.exchanges, between=f"{self.exchanges.between} {stays}")

    def _told(self, run: Run) -> tuple[str, Exchanges, str]:
        """What this process does, what that exchanges, and behind what it comes, for others."""
        exchanges = self._exchanges_now()
        if self.code.name != "training":
            return f"an {self.code.name}", exchanges, ""
        half = "backward" if run.backward else "forward"
        return f"the {half} of a training step", exchanges, f" behind {run.updates} update(s)"

    @contextmanager
    def _metered(self, input_bytes: int) -> Iterator[None]:
        if self.meter is None:
            yield
            return
        try:
            self.meter.tier.book("the step's inputs", input_bytes)
            with self.meter:
                yield
        finally:
            self.meter.tier.book("the step's inputs", 0)


def _bytes_of(inputs: list[Any]) -> int:
    return sum(value.nbytes for value in inputs if isinstance(value, Tensor))


class ProgramRun:
    """One run of a program: a generator that sleeps at each of its turns.

    A machine may have any number of them under way, since nothing is read from chunks while a program sleeps.
    """

    def __init__(self, executor: Executor, inputs: list[Any]) -> None:
        self.executor = executor
        self.run = Run(executor.code.reduces)
        self.input_bytes = _bytes_of(inputs)
        self.generator: Generator[Any, Any, dict[str, Tensor]] | None = executor.loaded.function(*inputs)
        self.results: dict[str, Tensor] = {}
        self.turns = 0

    def advance(self, received: list[Tensor] | None = None) -> list[Tensor]:
        """Go on to the next turn, with what comes in at the one where the program sleeps; returns what it hands out
        there. At its end nothing: `results` then has everything by role."""
        assert self.generator is not None
        generator, self.generator = self.generator, None  # a run that fails cannot go on
        if received is not None:
            received = [
                _laid_out(t, s) for t, s in zip(received, self.executor.code.turns[self.turns - 1], strict=True)
            ]
        with self.executor.resume(self.run, self.input_bytes):
            try:
                outputs, _ = generator.send(received)
            except StopIteration as stop:
                self.results = stop.value
                return []
            self.executor.machine.check_at_rest(self.executor.code.name)
        self.generator, self.turns = generator, self.turns + 1
        return outputs


@dataclass(frozen=True)
class Outlets:
    """What autograd sees of a training program's inputs and outputs, by their positions.

    `differentiable` outputs take a gradient; `saved_inputs` and `saved_outputs` are read by the backward. `sources`
    tells by a gradient's role, such as gradient:fc.weight, which outputs it comes from.
    """

    differentiable: tuple[int, ...]
    saved_inputs: frozenset[int] = frozenset()
    saved_outputs: frozenset[int] = frozenset()
    sources: Mapping[str, frozenset[int]] = field(default_factory=dict)


class TrainingRun(ProgramRun):
    """One step of a training program: `forward` up to the turn, `backward` from there to the end."""

    def __init__(self, executor: Executor, inputs: list[Any], outlets: Outlets) -> None:
        super().__init__(executor, inputs)
        self.outlets = outlets
        self.likes: list[Tensor] = []  # of the outputs that take a gradient, without memory
        self.versions = executor.machine.store.versions()
        self.run.updates = executor.machine.updates(self.versions)
        self.inputs = [(weakref.ref(inputs[i]), inputs[i]._version) for i in outlets.saved_inputs]
        self.saved: list[tuple[Tensor, int]] = []

    def forward(self) -> list[Tensor]:
        """Run up to the turn, and take note of what the backward will read. Returns the outputs."""
        outputs = self.advance()
        self.likes = [torch.empty_like(outputs[i], device="meta") for i in self.outlets.differentiable]
        self.saved = [(_counter(outputs[i]), outputs[i]._version) for i in self.outlets.saved_outputs]
        # The forward itself writes buffers; whoever writes after it changes what the backward reads.
        self.inputs = [(ref, t._version) for ref, _ in self.inputs if (t := ref()) is not None]
        return outputs

    def backward(self, tangents: list[Tensor | None], of_parameters: bool = True) -> dict[str, Tensor]:
        """Returns the gradients of inputs; those of parameters are in `.grad`, unless none are wanted. `tangents` are
        the outputs', None where nothing read one: what only such outputs reach gets no gradient. Raises StateError
        twice.
        """
        if self.generator is None:
            raise StateError(
                "backward() ran a second time through the same step, whose activations are freed as they are "
                "used; call the model again, or sum the losses and call backward() once (retain_graph has no "
                "effect on a compiled step)"
            )
        self._check_unchanged()
        self.run.backward = True
        unreached = self._unreached(tangents)
        device = self.executor.machine.device
        received = [torch.zeros_like(like, device=device) if t is None else t
                    for like, t in zip(self.likes, tangents, strict=True)]  # fmt: skip
        if of_parameters:
            scale = self.executor.machine.store.begin_backward()
            self.run.counts = True
        else:
            scale, self.run.absent = 1.0, self._all_parameters()
        # A loss scale goes through the backward: the store takes it out of parameters' gradients, and this of inputs'.
        self.advance([tangent * scale for tangent in received] if scale != 1.0 else received)
        if self.generator is not None:
            raise GeminiError(f"'{self.executor.code.name}' did not end after its backward; its text was changed")
        results, self.results = self.results, {}
        found = {role: t / scale if scale != 1.0 else t for role, t in results.items() if role not in unreached}
        if of_parameters:
            self.executor.machine.store.end_backward()
        return found

    def _unreached(self, tangents: list[Tensor | None]) -> set[str]:
        """The gradients that come from no output that was used on any rank; the machine is told of parameters'."""
        if len(tangents) == 1 and (tangents[0] is not None or self.executor.machine.ranks.together):
            return set()  # among ranks an only output is taken to be used: asking would cost every step
        machine = self.executor.machine
        used = machine.ranks.on_any([tangent is not None for tangent in tangents], machine.device)
        positions = {i for i, is_used in zip(self.outlets.differentiable, used, strict=True) if is_used}
        unreached = {role for role, sources in self.outlets.sources.items() if not sources & positions}
        places = machine.store.chunks.layout.places
        names = (role.removeprefix("gradient:") for role in unreached)
        self.run.absent = frozenset((places[n][0].index, places[n][1]) for n in names if n in places)
        return unreached

    def _all_parameters(self) -> frozenset[tuple[int, int]]:
        chunks = self.executor.machine.store.chunks.layout.chunks
        return frozenset((chunk.index, slot) for chunk in chunks for slot in range(len(chunk.slots)))

    def _check_unchanged(self) -> None:
        """Weights are read again in the backward: others than the forward's would give wrong gradients."""
        now = self.executor.machine.store.versions()
        changed = next((name for name, version in now.items() if version != self.versions[name]), None)
        if changed is not None:
            raise StateError(
                f"parameter {changed} was changed in place between the call of the model and its backward(), as "
                f"by optimizer.step(). {self.executor.machine.store.stale()}"
            )
        if any(t is not None and t._version != version for t, version in ((ref(), v) for ref, v in self.inputs)):
            raise StateError(
                "an input or a buffer was changed in place between the call of the model and its backward(), which "
                "reads it; change a copy instead, or call the model again"
            )
        if any(counter._version != version for counter, version in self.saved):
            raise StateError(
                "an output of the model was changed in place before its backward(), which reads it; change a copy "
                "instead, as y = y * 2 does for y *= 2"
            )


def _laid_out(tangent: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The backward was traced for gradients laid out like the outputs; autograd may bring views of any kind."""
    if tangent.stride() == stride:
        return tangent
    return torch.empty_strided(tangent.shape, stride, dtype=tangent.dtype, device=tangent.device).copy_(tangent)


def _counter(tensor: Tensor) -> Tensor:
    """An empty tensor that counts the writes to another one, and does not keep it alive."""
    counter = tensor.detach()
    counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return counter


class Step(torch.autograd.Function):
    """One training step as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, run: TrainingRun, anchor: Tensor, *inputs: Tensor) -> Any:
        # The program sleeps with its own outputs in hand: handed out themselves, they would hold it and it them,
        # and a loss that is dropped without a backward would keep its activations.
        outputs = [output.detach() for output in run.forward()]
        ctx.run, ctx.anchor = run, anchor
        ctx.mark_non_differentiable(*(t for i, t in enumerate(outputs) if i not in run.outlets.differentiable))
        ctx.set_materialize_grads(False)  # an output that nothing reads has no gradient, which is not a zero
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # what this returned would pass for a constant
            raise StateError(
                "a gradient of a gradient was asked for (create_graph=True, as gradient penalties do), and a compiled "
                "step is differentiated once. Leave create_graph out, or train this model without geminifx"
            )
        # torch.autograd.grad(loss, inputs) leaves parameters' gradients alone, and the anchor's, too.
        of_parameters = will_accumulate(ctx.anchor)
        results = ctx.run.backward([tangents[i] for i in ctx.run.outlets.differentiable], of_parameters)
        gradients = (results.get(role) for role in ctx.run.executor.code.input_gradients)
        return (None, None, *gradients)


class NoGradient(torch.autograd.Function):
    """Marks an output that was compiled without a gradient: one that reaches it is an error, not a zero."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        raise StateError(
            "a gradient reached an output that was compiled without one: with labels only the loss is "
            "differentiable. Compile with outputs='all', or compute the loss from the logits without labels."
        )
