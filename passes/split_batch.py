"""Run a batch as several microbatches: each block for all of them before the next block.

    before (two microbatches)                         after
    # forward: layers.0                               # forward: layers.0
    x = geminifx.microbatch(batch, 0, 2)              x = geminifx.microbatch(batch, 0, 2)
    h = aten.mm.default(x, w)                         h = aten.mm.default(x, w)
                                                      x_1 = geminifx.microbatch(batch, 1, 2)
                                                      h_1 = aten.mm.default(x_1, w)
    # forward: layers.1                               # forward: layers.1
    y = aten.mm.default(h, v)                         y = aten.mm.default(h, v)
                                                      y_1 = aten.mm.default(h_1, v)
                                                      cat = aten.cat.default([y, y_1])
    # backward: layers.1                              # backward: layers.1
    dv = aten.mm.default(ht, dy)                      dv = aten.mm.default(ht, dy)
                                                      total = aten._to_copy.default(dv, dtype=torch.float32)
                                                      dv_1 = aten.mm.default(ht_1, dy_1)
                                                      total_1 = aten.add_.Tensor(total, dv_1)
    return {"output:0": y, "gradient:v": dv}          return {"output:0": cat, "gradient:v": total_1}

So weights cross the bus once for all microbatches, and what a block computes again, or for its gradients, is there for
one microbatch at a time. What no example goes into is computed once. Gradients are added up in float32, in the order
of the microbatches, and rounded once; `average` is the mean over microbatches, and then over ranks. It ends a run: all
microbatches come so far before any of them goes on.

Random numbers are those of one call for each microbatch after the other. The generator is led through the draws of all
but the last in front of everything; its states on the way are kept, and each microbatch goes on from its own.

Which models can be divided so is told in `sharding/microbatches.py`. The order is that of GreedySnake.
"""

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

from ..runtime.isa.instructions import AVERAGE, DRAWN, MICROBATCH, SAVE_RNG, SWAP_RNG
from ..runtime.isa.linear_cross_entropy import ABSENT
from ..runtime.isa.precision import accumulate_dtype
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Note, Program, is_random, note, tensor_type, type_of
from .program.types import TensorType
from .program.verify import canonical

aten = torch.ops.aten
JOINS = (AVERAGE, ABSENT)
"""What is computed once of all microbatches."""


@graph_pass(requires=(canonical,))
def split_batch(program: Program, plan: Plan) -> None:
    if plan.microbatches > 1:
        _Split(program, plan).run()


class _Split:
    """A walk over the program that writes all of it anew, behind what there was.

    `copies` tells for each microbatch but the first, whose values are the old ones, what stands for a value.
    """

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program, self.plan = program, plan
        self.count = plan.microbatches
        self.copies: list[dict[fx.Node, fx.Node]] = [{} for _ in range(self.count)]
        self.own = _of_microbatches(program)
        self.gradients: dict[str, _Total] = {}  # by their roles
        self.totals = defaultdict[fx.Node, list[_Total]](list)  # by their terms
        self._find_totals()
        self.states: list[fx.Node] = []

    def run(self) -> None:
        forward = [node for node in self.program.computes if note(node).phase == "forward"]
        backward = [node for node in self.program.computes if note(node).phase == "backward"]
        self._draw_ahead([node for node in forward if is_random(node)])
        for nodes, kind in ((forward, "output"), (backward, "gradient")):
            for run in _runs(nodes, self.plan.blocks):
                self._run(run)
            self._join_results(kind)

    def _find_totals(self) -> None:
        """Gradients of what has a row for each example are put together, and all others added up."""
        inputs, made = self.program.inputs("input"), dict[fx.Node, _Total]()
        batch = {f"input:{name}" for name, node in inputs.items() if any(u.target is MICROBATCH for u in node.users)}
        for name, node in self.program.results_of("gradient").items():
            if name in batch:
                continue
            if node not in made:
                terms = _terms(node)
                made[node] = _Total(tensor_type(node).dtype, self.count * len(terms))
                for term in terms:
                    self.totals[term].append(made[node])
            self.gradients[f"gradient:{name}"] = made[node]

    # -- writing -------------------------------------------------------------------------------------------

    def _emit(self, target: Any, *args: Any, like: Note, name: str | None = None, **kwargs: Any) -> fx.Node:
        return self.program.emit(target, args, kwargs, before=self.program.output, like=like, name=name)

    def _run(self, run: list[fx.Node]) -> None:
        """All microbatches, one after the other, through one run; what joins them cuts it."""
        piece: list[fx.Node] = []
        for node in run:
            if node.target in JOINS:
                self._piece(piece)
                self._join(node)
                piece = []
            else:
                piece.append(node)
        self._piece(piece)

    def _piece(self, nodes: list[fx.Node]) -> None:
        own = [node for node in nodes if node in self.own]
        for node in nodes:
            if node not in self.own:
                self.program.output.prepend(node)
                self._add_up(node, node)
        draws = any((is_random(node) or node.target is SAVE_RNG) and note(node).phase == "forward" for node in own)
        for number in range(self.count if own else 0):
            state = self.states[number : number + 1] if draws else []
            self._swap(state, own[0])
            for node in own:
                self._add_up(node, self._copy(node, number))
            self._swap(state, own[-1])

    def _copy(self, node: fx.Node, number: int) -> fx.Node:
        if number == 0:
            self.program.output.prepend(node)
            return node
        found = self.copies[number]
        copy = found[node] = self.program.repeat_node(node, lambda value: found.get(value, value), self.program.output)
        if node.target is MICROBATCH:
            copy.args = (node.args[0], number, self.count)
        return copy

    def _all(self, node: fx.Node) -> list[fx.Node]:
        return [node, *(found[node] for found in self.copies[1:])]

    # -- what joins ------------------------------------------------------------------------------------------

    def _join(self, node: fx.Node) -> None:
        value = node.args[0]
        if node.target is AVERAGE and value in self.own:
            value = self._emit(aten.div.Tensor, self._total(value), self.count, like=note(node))
        if node.target is AVERAGE and self.plan.batches == 1:
            self.program.replace(node, value)
            return
        node.update_arg(0, value)
        self.program.output.prepend(node)

    def _total(self, value: fx.Node) -> fx.Node:
        total, *others = self._all(value)
        for other in others:
            total = self._emit(aten.add.Tensor, total, other, like=note(value))
        return total

    def _join_results(self, kind: str) -> None:
        """Results of one kind, each of all microbatches."""
        results = dict(self.program.results)
        for name, value in self.program.results_of(kind).items():
            total = self.gradients.get(f"{kind}:{name}")
            if total is not None:
                results[f"{kind}:{name}"] = total.value
            elif value in self.own:
                results[f"{kind}:{name}"] = self._emit(aten.cat.default, self._all(value), like=note(value))
        self.program.set_results(results)

    # -- gradients -------------------------------------------------------------------------------------------

    def _add_up(self, term: fx.Node, value: fx.Node) -> None:
        """A gradient, or a term of one, is there, for one microbatch or for all of them."""
        if self.totals[term] and term not in self.own:
            value = self._emit(aten.mul.Tensor, value, self.count, like=note(term))
        for total in self.totals[term]:
            if total.value is None:
                wide = accumulate_dtype(total.dtype)
                total.value = self._emit(aten._to_copy.default, value, dtype=wide, like=note(term), name="total")
            else:
                total.value = self._emit(aten.add_.Tensor, total.value, value, like=note(term), name="total")
            total.missing -= 1 if term in self.own else self.count
            if not total.missing and tensor_type(total.value).dtype != total.dtype:
                rounded = {"dtype": total.dtype, "name": "rounded"}
                total.value = self._emit(aten._to_copy.default, total.value, like=note(term), **rounded)

    # -- random numbers --------------------------------------------------------------------------------------

    def _draw_ahead(self, drawing: list[fx.Node]) -> None:
        """Lead the generator on to where the last microbatch begins, and keep where each of the others does."""
        if not drawing:
            return
        batch = next(iter(self.program.inputs("input").values()))
        for _ in range(self.count - 1):
            state = self._emit(SAVE_RNG, batch, like=Note())
            self.states.append(state)
            for node in drawing:
                self._draw(node, state)

    def _draw(self, node: fx.Node, state: fx.Node) -> None:
        """What a random operator draws follows from its arguments' types alone."""
        zeros = {value: self._zeros(tensor_type(value), note(node)) for value in node.all_input_nodes}
        drawn = self.program.repeat_node(node, zeros.__getitem__, self.program.output)
        if isinstance(type_of(node), tuple):
            drawn = self._emit(operator.getitem, drawn, 0, like=note(node))
        self._emit(DRAWN, state, drawn, like=note(node))

    def _zeros(self, type: TensorType, like: Note) -> fx.Node:
        options = {"dtype": type.dtype, "device": torch.device("cpu")}
        empty = self._emit(aten.empty_strided.default, list(type.shape), list(type.stride), like=like, **options)
        return self._emit(aten.zeros_like.default, empty, like=like)

    def _swap(self, states: list[fx.Node], like: fx.Node) -> None:
        """Let the generator go on from a microbatch's state, or keep that and go back."""
        for state in states:
            self._emit(SWAP_RNG, state, like=note(like))


@dataclass(eq=False)
class _Total:
    """A gradient that is added up: `missing` counts values still to come, of each of its terms one a microbatch."""

    dtype: torch.dtype
    missing: int
    value: fx.Node | None = None


def _of_microbatches(program: Program) -> set[fx.Node]:
    """The values that each microbatch has for itself: what is made of examples, or of numbers that it draws."""
    own: set[fx.Node] = set()
    for node in program.computes:
        begins = node.target in (MICROBATCH, SAVE_RNG) or is_random(node)
        if node.target not in JOINS and (begins or not own.isdisjoint(node.all_input_nodes)):
            own.add(node)
    return own


def _runs(nodes: list[fx.Node], blocks: tuple[str, ...]) -> Iterator[list[fx.Node]]:
    """Consecutive operators of one block, or of none. Where no module is known, as of sums in the backward, an operator
    goes with the one in front of it."""
    block_of = cache(lambda module: next((name for name in blocks if f"{module}.".startswith(f"{name}.")), ""))
    run: list[fx.Node] = []
    block = ""
    for node in nodes:
        now = block_of(note(node).module) if note(node).module else block
        if now != block and run:
            yield run
            run = []
        block = now
        run.append(node)
    yield run


def _terms(gradient: fx.Node) -> list[fx.Node]:
    """What a gradient is the sum of. That of a weight with several readers is added up reader by reader: the first
    ones' gradients do not wait for the last one."""
    if gradient.target is not aten.add.Tensor or gradient.kwargs or len(gradient.users) != 1:
        return [gradient]
    terms = [value for value in gradient.args if isinstance(value, fx.Node) and type_of(value) == type_of(gradient)]
    return [term for value in terms for term in _terms(value)] if len(terms) == 2 else [gradient]
