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

from torch import fx

from ..runtime.isa.instructions import AVERAGE, MICROBATCH
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, is_random, note
from .program.verify import canonical
from .splitting.parts import JOINS, Parts, aten, draws_forward, runs


@graph_pass(requires=(canonical,))
def split_batch(program: Program, plan: Plan) -> None:
    if plan.microbatches > 1 and plan.schedule is None:
        _Split(program, plan).run()


class _Split:
    """A walk over the program that writes all of it anew, behind what there was.

    `copies` tells for each microbatch but the first, whose values are the old ones, what stands for a value.
    """

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program, self.plan = program, plan
        self.parts = Parts(program, plan.microbatches)
        self.count, self.own = self.parts.count, self.parts.own
        self.copies: list[dict[fx.Node, fx.Node]] = [{} for _ in range(self.count)]
        self.gradients, self.totals = self.parts.totals(lambda term: self.count)
        self.states: list[fx.Node] = []

    def run(self) -> None:
        forward = [node for node in self.program.computes if note(node).phase == "forward"]
        backward = [node for node in self.program.computes if note(node).phase == "backward"]
        self._draw_ahead([node for node in forward if is_random(node)])
        for nodes, kind in ((forward, "output"), (backward, "gradient")):
            for run in runs(nodes, self.plan.blocks):
                self._run(run)
            self._join_results(kind)

    def _draw_ahead(self, drawing: list[fx.Node]) -> None:
        """Lead the generator on to where the last microbatch begins, and keep where each of the others does."""
        for _ in range(self.count - 1 if drawing else 0):
            self.states.append(self.parts.save_state())
            for node in drawing:
                self.parts.draw(node, self.states[-1])

    # -- writing -------------------------------------------------------------------------------------------

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
        draws = draws_forward(own)
        for number in range(self.count if own else 0):
            state = self.states[number] if draws and number < len(self.states) else None
            self.parts.swap(state, own[0])
            for node in own:
                self._add_up(node, self._copy(node, number))
            self.parts.swap(state, own[-1])

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

    def _add_up(self, term: fx.Node, value: fx.Node) -> None:
        """A gradient, or a term of one, is there, for one microbatch or for all of them."""
        if term in self.totals:
            for total in self.parts.add(term, value, self.totals[term]):
                total.value = self.parts.rounded(total, note(term))

    # -- what joins ------------------------------------------------------------------------------------------

    def _join(self, node: fx.Node) -> None:
        value = node.args[0]
        if node.target is AVERAGE and value in self.own:
            value = self.parts.mean(self._all(value), note(node))
        if node.target is AVERAGE and self.plan.batches == 1:
            self.program.replace(node, value)
            return
        node.update_arg(0, value)
        self.program.output.prepend(node)

    def _join_results(self, kind: str) -> None:
        """Results of one kind, each of all microbatches."""
        results = dict(self.program.results)
        for name, value in self.program.results_of(kind).items():
            total = self.gradients.get(f"{kind}:{name}")
            if total is not None:
                results[f"{kind}:{name}"] = total.value
            elif value in self.own:
                results[f"{kind}:{name}"] = self.parts.emit(aten.cat.default, self._all(value), like=note(value))
        self.program.set_results(results)
