"""Runs generated programs and connects them to autograd, so that they fit into any training loop.

A program's text is compiled by Python once and runs as it is: there is no per-node dispatch. A training program is a
generator that sleeps between forward and backward. Its local variables are what the backward needs; they are freed as
the backward proceeds, or with the autograd graph if no backward comes.
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
from .isa.torch_private import below_autograd, will_accumulate
from .kernels.fused import kernel_of
from .machine import Machine
from .memory.state_store import Run
from .memory.tiers import MemoryMeter, metering
from .quick_calls import Operators

_numbers = count()


@dataclass(frozen=True)
class Code:
    """A generated program ready to be loaded.

    Fields:
        name: the name of the function that `source` defines.
        inputs: the roles of the function's parameters, in order.
        namespaces: the operator libraries of `torch.ops` that the text names.
        reduces: the chunks that the backward reduces.
        turns: for each turn, the strides of the tensors that it receives, such as the gradients of outputs.
        input_gradients: the roles of the input gradients that the program returns.
    """

    name: str
    source: str
    inputs: tuple[str, ...]
    namespaces: frozenset[str]
    reduces: frozenset[int] = frozenset()
    turns: tuple[tuple[tuple[int, ...], ...], ...] = ()
    input_gradients: tuple[str, ...] = ()


def called_by_programs(machine: Machine) -> SimpleNamespace:
    """What programs call as `geminifx`: the machine's instructions, and the compute operators, which torch
    dispatches."""
    instructions = {name: getattr(machine, name) for name in INSTRUCTIONS}
    return SimpleNamespace(**instructions, **OPERATORS, fused=kernel_of(machine.device))


class Loaded:
    """A program's compiled Python function; tracebacks through it show the program's lines.

    The function's globals reference the function and what it calls, which references the globals: `__del__` breaks this
    cycle.
    """

    def __init__(self, code: Code, called: SimpleNamespace, device: torch.device) -> None:
        self.filename = f"<geminifx {code.name} {next(_numbers)}>"
        self.world: dict[str, Any] = {
            "torch": torch, "operator": operator, "inf": math.inf, "nan": math.nan, "DEVICE": device,
            **{name: Operators(getattr(torch.ops, name)) for name in code.namespaces}, "geminifx": called,
        }  # fmt: skip
        lines = code.source.splitlines(keepends=True)
        linecache.cache[self.filename] = (len(code.source), None, lines, self.filename)
        exec(compile(code.source, self.filename, "exec"), self.world)
        self.function: Callable[..., Any] = self.world[code.name]

    def __del__(self) -> None:
        linecache.cache.pop(self.filename, None)
        self.world.clear()


class Executor:
    """Runs one program on a machine; `exchanges` describes what the program exchanges with other processes."""

    def __init__(self, code: Code, machine: Machine, meter: MemoryMeter | None,
                 exchanges: Exchanges = NOTHING) -> None:  # fmt: skip
        self.code = code
        self.exchanges = exchanges
        self.machine = machine
        self.meter = meter
        self.called = called_by_programs(machine)
        self.loaded = Loaded(code, self.called, machine.device)

    def evaluate(self, inputs: list[Any]) -> dict[str, Tensor]:
        """Runs a program that has no backward, on tensors and numbers; returns its results by role."""
        with self.resume(Run(), _bytes_of(inputs)):
            return self.loaded.function(*inputs)

    @contextmanager
    def resume(self, run: Run, input_bytes: int) -> Iterator[None]:
        """Context in which a program runs: `run` is the machine's current run, autograd and autocast are off, memory is
        metered."""
        machine = self.machine
        try:
            with (
                torch.no_grad(),
                below_autograd(),
                torch.autocast(machine.device.type, enabled=False),
                self._metered(input_bytes),
            ):
                machine.run = run
                machine.ranks.begin(*self._announced(run))
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
        """The program's exchanges, and which of the sharded chunks are whole on the device: those are not gathered."""
        stays = [chunk.resident is not None for chunk in self.machine.chunks if chunk.layout.shards > 1]
        if not stays or not self.exchanges.between:
            return self.exchanges
        return replace(self.exchanges, between=f"{self.exchanges.between} {stays}")

    def _announced(self, run: Run) -> tuple[str, Exchanges, str]:
        """What this process is doing, what it exchanges, and how many updates came before, for `Ranks.begin`."""
        exchanges = self._exchanges_now()
        if self.code.name != "training":
            return f"an {self.code.name}", exchanges, ""
        half = "backward" if run.backward else "forward"
        return f"the {half} of a training step", exchanges, f" after {run.updates} update(s)"

    @contextmanager
    def _metered(self, input_bytes: int) -> Iterator[None]:
        if self.meter is None:
            yield
            return
        try:
            self.meter.tier.book("the step's inputs", input_bytes)
            with metering(self.meter):
                yield
        finally:
            self.meter.tier.book("the step's inputs", 0)


def _bytes_of(inputs: list[Any]) -> int:
    return sum(value.nbytes for value in inputs if isinstance(value, Tensor))


class ProgramRun:
    """One run of a program: a generator that sleeps at each turn.

    A machine may have any number of runs under way, because a sleeping program does not read from chunks.
    """

    def __init__(self, executor: Executor, inputs: list[Any]) -> None:
        self.executor = executor
        self.run = Run(executor.code.reduces)
        self.input_bytes = _bytes_of(inputs)
        self.generator: Generator[Any, Any, dict[str, Tensor]] | None = executor.loaded.function(*inputs)
        self.results: dict[str, Tensor] = {}
        self.turns = 0

    def advance(self, received: list[Tensor] | None = None) -> list[Tensor]:
        """Resumes the program with the tensors `received` at the turn where it sleeps (None at the start), and runs it
        to the next turn. Returns what the program yields there, or an empty list at its end, when `results` holds its
        results by role."""
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
    """What autograd sees of a training program's inputs and outputs, by position.

    `differentiable` outputs take a gradient; the backward reads `saved_inputs` and `saved_outputs`. `sources` maps the
    role of each gradient, such as gradient:fc.weight, to the positions of the outputs it comes from.
    """

    differentiable: tuple[int, ...]
    saved_inputs: frozenset[int] = frozenset()
    saved_outputs: frozenset[int] = frozenset()
    sources: Mapping[str, frozenset[int]] = field(default_factory=dict)


class TrainingRun(ProgramRun):
    """One step of a training program: `forward` runs up to the turn, `backward` from there to the end."""

    def __init__(self, executor: Executor, inputs: list[Any], outlets: Outlets) -> None:
        super().__init__(executor, inputs)
        self.outlets = outlets
        self.likes: list[Tensor] = []  # meta tensors like the outputs that take a gradient
        self.versions = executor.machine.store.versions()
        self.run.updates = executor.machine.updates(self.versions)
        self.inputs = [(weakref.ref(inputs[i]), inputs[i]._version) for i in outlets.saved_inputs]
        self.saved: list[tuple[Tensor, int]] = []

    def forward(self) -> list[Tensor]:
        """Runs up to the turn and records the versions of tensors that the backward will read. Returns the outputs."""
        outputs = self.advance()
        self.likes = [torch.empty_like(outputs[i], device="meta") for i in self.outlets.differentiable]
        self.saved = [(_counter(outputs[i]), outputs[i]._version) for i in self.outlets.saved_outputs]
        # The forward itself writes buffers; a write after it changes what the backward reads.
        self.inputs = [(ref, t._version) for ref, _ in self.inputs if (t := ref()) is not None]
        return outputs

    def backward(self, tangents: list[Tensor | None], of_parameters: bool = True) -> dict[str, Tensor]:
        """Runs the backward and returns the gradients of inputs by role; those of parameters are left in `.grad`, or
        dropped if not `of_parameters`. `tangents` are the gradients of the differentiable outputs, None for an output
        that nothing used: what only such outputs reach gets no gradient. Raises StateError on a second call, and after
        an in-place change of a tensor that the backward reads."""
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
        # The loss scale passes through the backward: the store takes it out of parameters' gradients, this method out
        # of inputs'.
        self.advance([tangent * scale for tangent in received] if scale != 1.0 else received)
        if self.generator is not None:
            raise GeminiError(
                f"'{self.executor.code.name}' did not end after its backward; the text of the program was changed"
            )
        results, self.results = self.results, {}
        found = {role: t / scale if scale != 1.0 else t for role, t in results.items() if role not in unreached}
        if of_parameters:
            self.executor.machine.store.end_backward()
        return found

    def _unreached(self, tangents: list[Tensor | None]) -> set[str]:
        """The roles of gradients that depend on no output used on any rank; sets `run.absent` to the parameters among
        them."""
        if len(tangents) == 1 and (tangents[0] is not None or self.executor.machine.ranks.together):
            return set()  # with several ranks a sole output counts as used: asking would cost every step
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
        """Raises StateError if a tensor that the backward reads has changed since the forward: gradients would be
        wrong."""
        now = self.executor.machine.store.versions()
        changed = next((name for name, version in now.items() if version != self.versions[name]), None)
        if changed is not None:
            raise StateError(
                f"parameter {changed} was changed in place between the call of the model and its backward(), for "
                f"example by optimizer.step(). {self.executor.machine.store.stale()}"
            )
        if any(t is not None and t._version != version for t, version in ((ref(), v) for ref, v in self.inputs)):
            raise StateError(
                "an input or a buffer was changed in place between the call of the model and its backward(), which "
                "reads it; change a copy instead, or call the model again"
            )
        if any(counter._version != version for counter, version in self.saved):
            raise StateError(
                "an output of the model was changed in place before its backward(), which reads it; change a copy "
                "instead, for example y = y * 2 instead of y *= 2"
            )


def _laid_out(tangent: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`tangent` in its output's strides, which the backward was traced for; autograd may pass views of any kind."""
    if tangent.stride() == stride:
        return tangent
    return torch.empty_strided(tangent.shape, stride, dtype=tangent.dtype, device=tangent.device).copy_(tangent)


def _counter(tensor: Tensor) -> Tensor:
    """An empty tensor that shares the version counter of `tensor` without keeping its memory alive."""
    counter = tensor.detach()
    counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return counter


class Step(torch.autograd.Function):
    """One training step as a single node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, run: TrainingRun, anchor: Tensor, *inputs: Tensor) -> Any:
        # The sleeping program holds its own outputs. If these were returned, outputs and program would hold each other,
        # and a loss dropped without a backward would keep its activations.
        outputs = [output.detach() for output in run.forward()]
        ctx.run, ctx.anchor = run, anchor
        ctx.mark_non_differentiable(*(t for i, t in enumerate(outputs) if i not in run.outlets.differentiable))
        ctx.set_materialize_grads(False)  # an output that nothing uses has no gradient, rather than a zero one
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # what this returns would be taken for a constant
            raise StateError(
                "a second derivative was requested (create_graph=True, as for gradient penalties), but a compiled "
                "step can be differentiated only once. Leave create_graph out, or train this model without geminifx"
            )
        # torch.autograd.grad(loss, inputs) accumulates into no parameter, and so not into the anchor.
        of_parameters = will_accumulate(ctx.anchor)
        results = ctx.run.backward([tangents[i] for i in ctx.run.outlets.differentiable], of_parameters)
        gradients = (results.get(role) for role in ctx.run.executor.code.input_gradients)
        return (None, None, *gradients)


class NoGradient(torch.autograd.Function):
    """Marks an output that was compiled without a gradient: a gradient that reaches it is an error, not a zero."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        raise StateError(
            "a gradient reached an output that was compiled without a gradient: when labels are passed, only the loss "
            "is differentiable. Compile with outputs='all', or compute the loss from the logits of a call without "
            "labels."
        )
