"""Gradient sums and random numbers for the passes that write a program anew for several microbatches.

Gradients are summed in float32, in the order of the microbatches, and rounded once. Random numbers are those of
separate calls, one per microbatch, in order: at the start of the program the generator is advanced through the draws,
its states in between are saved, and each microbatch continues from its own.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

from ...runtime.isa.instructions import AVERAGE, DRAWN, FORK_RNG, MICROBATCH, SAVE_RNG, SWAP_RNG
from ...runtime.isa.linear_cross_entropy import ABSENT
from ...runtime.isa.precision import accumulate_dtype
from ..program.program import Note, Program, is_random, microbatches_of, note, tensor_type, type_of
from ..program.types import TensorType

aten = torch.ops.aten
JOINS = (AVERAGE, ABSENT)
"""Operators computed once for all microbatches."""


def of_microbatches(program: Program) -> set[fx.Node]:
    """The values that differ between microbatches: those that depend on examples or on random numbers."""
    own: set[fx.Node] = set()
    for node in program.computes:
        begins = node.target in (MICROBATCH, SAVE_RNG) or is_random(node)
        if node.target not in JOINS and (begins or not own.isdisjoint(node.all_input_nodes)):
            own.add(node)
    return own


def block_finder(blocks: tuple[str, ...]) -> Callable[[str], str]:
    """A function from a module's name to the block that it is or belongs to; "" for none."""
    return cache(lambda module: next((name for name in blocks if f"{module}.".startswith(f"{name}.")), ""))


def terms(gradient: fx.Node) -> list[fx.Node]:
    """The terms that a gradient is the sum of. A weight with several readers has one term per reader; summing them
    separately frees the first readers' gradients before the last one's exists."""
    if gradient.target is not aten.add.Tensor or gradient.kwargs or len(gradient.users) != 1:
        return [gradient]
    values = [value for value in gradient.args if isinstance(value, fx.Node) and type_of(value) == type_of(gradient)]
    return [term for value in values for term in terms(value)] if len(values) == 2 else [gradient]


@dataclass(eq=False)
class Total:
    """A running sum of a gradient. `outstanding` counts the values still to come: one per term and microbatch."""

    gradient: fx.Node
    outstanding: int
    value: fx.Node | None = None

    @property
    def dtype(self) -> torch.dtype:
        return tensor_type(self.gradient).dtype


class Parts:
    """A program being written for `count` microbatches. `own` are the values that differ between microbatches."""

    def __init__(self, program: Program, count: int) -> None:
        self.program = program
        self.count = count
        self.own = of_microbatches(program)

    def emit(self, target: Any, *args: Any, like: Note, name: str | None = None, **kwargs: Any) -> fx.Node:
        return self.program.emit(target, args, kwargs, before=self.program.output, like=like, name=name)

    def mean(self, values: list[fx.Node], like: Note) -> fx.Node:
        """The mean of the microbatches' values."""
        total, *others = values
        for other in others:
            total = self.emit(aten.add.Tensor, total, other, like=note(total))
        return self.emit(aten.div.Tensor, total, self.count, like=like)

    # -- gradients -----------------------------------------------------------------------------------------

    def totals(self, here: Callable[[fx.Node], int]) -> tuple[dict[str, Total], dict[fx.Node, list[Total]]]:
        """The gradients to be summed, by role and by term. `here(term)` is the number of microbatches for which this
        program computes a term. Gradients of inputs with one row per example are left out; they are concatenated."""
        inputs, made = self.program.inputs("input"), dict[fx.Node, Total]()
        batch = {f"input:{name}" for name, node in inputs.items() if microbatches_of(node)}
        by_role, by_term = dict[str, Total](), defaultdict[fx.Node, list[Total]](list)
        for name, node in self.program.results_of("gradient").items():
            if name in batch:
                continue
            found = [(term, here(term)) for term in terms(node) if here(term)]
            if node not in made and found:
                made[node] = Total(node, sum(count for _, count in found))
                for term, _ in found:
                    by_term[term].append(made[node])
            if found:
                by_role[f"gradient:{name}"] = made[node]
        return by_role, by_term

    def add(self, term: fx.Node, value: fx.Node, totals: list[Total]) -> Iterator[Total]:
        """Add a term's value for one microbatch or, if it does not differ between microbatches, for all of them. Yields
        the sums that this completes."""
        if term not in self.own:
            value = self.emit(aten.mul.Tensor, value, self.count, like=note(term))
        for total in totals:
            if total.value is None:
                wide = accumulate_dtype(total.dtype)
                total.value = self.emit(aten._to_copy.default, value, dtype=wide, like=note(term), name="total")
            else:
                total.value = self.emit(aten.add_.Tensor, total.value, value, like=note(term), name="total")
            total.outstanding -= 1 if term in self.own else self.count
            if not total.outstanding:
                yield total

    def rounded(self, total: Total, like: Note) -> fx.Node:
        """The value of a complete sum, in the gradient's dtype."""
        assert total.value is not None
        if tensor_type(total.value).dtype == total.dtype:
            return total.value
        return self.emit(aten._to_copy.default, total.value, dtype=total.dtype, like=like, name="rounded")

    # -- random numbers ------------------------------------------------------------------------------------

    def save_state(self) -> fx.Node:
        batch = next(iter(self.program.inputs("input").values()))
        return self.emit(SAVE_RNG, batch, like=Note())

    def draw(self, node: fx.Node, state: fx.Node) -> None:
        """Advance the generator from `state` by what a random operator draws, which depends on the types of its
        arguments alone."""
        zeros = {value: self._zeros(tensor_type(value), note(node)) for value in node.all_input_nodes}
        drawn = self.program.repeat_node(node, zeros.__getitem__, self.program.output)
        if isinstance(type_of(node), tuple):
            drawn = self.emit(operator.getitem, drawn, 0, like=note(node))
        self.emit(DRAWN, state, drawn, like=note(node))

    def _zeros(self, type: TensorType, like: Note) -> fx.Node:
        options = {"dtype": type.dtype, "device": torch.device("cpu")}
        empty = self.emit(aten.empty_strided.default, list(type.shape), list(type.stride), like=like, **options)
        return self.emit(aten.zeros_like.default, empty, like=like)

    def swap(self, state: fx.Node | None, like: fx.Node) -> None:
        """Exchange the generator's state with a microbatch's saved one, if there is one: once before its draws, once
        after."""
        if state is not None:
            self.emit(SWAP_RNG, state, like=note(like))


def drawn_apart(program: Program) -> set[fx.Node]:
    """The nodes that draw from a forked generator, and leave the original one as it is."""
    found, is_apart = set[fx.Node](), False
    for node in program.computes:
        if node.target is SWAP_RNG and node.args[0].target is FORK_RNG:
            is_apart = not is_apart
        elif is_apart:
            found.add(node)
    return found


def draws_forward(nodes: list[fx.Node]) -> bool:
    """Whether any of the nodes draws from the generator or saves its state in the forward."""
    return any((is_random(node) or node.target is SAVE_RNG) and note(node).phase == "forward" for node in nodes)


def runs(nodes: list[fx.Node], blocks: tuple[str, ...]) -> Iterator[list[fx.Node]]:
    """Splits nodes into runs of consecutive operators of one block, or of none. A node without a module, such as a sum
    in the backward, belongs to the block of the node before it."""
    block_of, run, block = block_finder(blocks), list[fx.Node](), ""
    for node in nodes:
        now = block_of(note(node).module) if note(node).module else block
        if now != block and run:
            yield run
            run = []
        block = now
        run.append(node)
    yield run
