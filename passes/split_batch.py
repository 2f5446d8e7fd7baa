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

Weights then cross the bus once for all microbatches, and a block's recomputed activations and temporaries exist for one
microbatch at a time. Values that do not depend on examples are computed once. Gradients are summed in float32, in the
order of the microbatches, and rounded once. `average` becomes the mean over microbatches and then over ranks; all
microbatches reach it before any of them continues.

Random numbers are those of separate calls, one per microbatch, in order. At the start of the program the generator is
advanced through the draws of all microbatches but the last. Its states in between are saved, and each microbatch
continues from its own.

With rounds, a few microbatches at a time run forward and backward before the next ones:

    # forward F.0, B.0, F.1           the forwards of two rounds, and the first one's backward between them
    loss = ...                        the mean over all microbatches
    # backward B.1
    scale = aten.div.Tensor(tangent, expected)
    dv_1 = aten.mm.default(ht_1, dy_1)
    total_1 = aten.add_.Tensor(total, dv_1)
    total_2 = aten.mul_.Tensor(total_1, scale)

Only one round's activations are in memory, and weights are fetched once per round. The turn precedes the last backward.
All backwards start from the expected tangent: 1, or the loss scale of float16. After the turn the gradient sums are
multiplied by the ratio of the actual tangent to the expected one, which is exact if that is a power of two, and done in
float32 otherwise. Tokens are counted ahead.

`sharding/microbatches.py` says which models can be split this way. The order is that of GreedySnake.
"""

from torch import fx

from ..runtime.isa.errors import SplitError
from ..runtime.isa.instructions import AVERAGE, MICROBATCH
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Note, Phase, Program, annotate, is_random, note, type_of
from .program.verify import canonical
from .splitting.fitting import has_input_gradients, only_loss
from .splitting.parts import JOINS, Parts, Total, aten, draws_forward, runs


@graph_pass(requires=(canonical,))
def split_batch(program: Program, plan: Plan) -> None:
    if plan.microbatches > 1 and plan.schedule is None:
        if plan.rounds > 1:
            _check_rounds(program)
        _Split(program, plan).run()


def _check_rounds(program: Program) -> None:
    """Raises SplitError for a step whose backward cannot begin before its tangent is known."""
    if not program.inputs("tangent") or not only_loss(program):
        raise SplitError(
            "rounds run backwards before loss.backward() is called, so the model must return a loss and no other "
            "differentiable output: let it compute its loss (labels=), or pass compile a function that does "
            "(loss_fn=), and leave outputs='all' out"
        )
    if has_input_gradients(program):
        raise SplitError(
            "rounds accumulate gradients of parameters only, but an input of the model requires a gradient; pass it "
            "without, by .detach(), or leave rounds= out"
        )


class _Split:
    """A walk over the program that writes all of it anew, after the old nodes.

    `copies` maps, for each microbatch but the first, old values to that microbatch's; the first uses the old nodes.
    `now` are the microbatches of the round being written.
    """

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program, self.plan, self.output = program, plan, program.output
        self.parts = Parts(program, plan.microbatches)
        self.count, self.own = self.parts.count, self.parts.own
        self.now = range(self.count)
        self.copies: list[dict[fx.Node, fx.Node]] = [{} for _ in range(self.count)]
        self.gradients, self.totals = self.parts.totals(lambda term: self.count)
        self.states: list[fx.Node] = []
        self.ahead: set[fx.Node] = set()  # nodes written before all rounds
        self.late: set[fx.Node] = set()  # nodes that depend on all microbatches, written in the last round
        self.scale: fx.Node | None = None  # actual tangent / expected tangent; set after the turn

    def run(self) -> None:
        forward = [node for node in self.program.computes if note(node).phase == "forward"]
        backward = [node for node in self.program.computes if note(node).phase == "backward"]
        self._draw_ahead([node for node in forward if is_random(node)])
        if self.plan.rounds == 1:
            self._sweep(forward, "output")
            self._sweep(backward, "gradient")
        else:
            self._run_rounds(forward, backward)

    def _sweep(self, nodes: list[fx.Node], kind: str) -> None:
        for run in runs(nodes, self.plan.blocks):
            self._run(run)
        if self.is_last:
            self._join_results(kind)

    def _draw_ahead(self, drawing: list[fx.Node]) -> None:
        """Advance the generator to where the last microbatch begins, saving the state at which each of the others
        begins."""
        for _ in range(self.count - 1 if drawing else 0):
            self.states.append(self.parts.save_state())
            for node in drawing:
                self.parts.draw(node, self.states[-1])

    # -- rounds --------------------------------------------------------------------------------------------

    @property
    def is_last(self) -> bool:
        """Whether the round being written is the last one."""
        return self.now.stop == self.count

    def _run_rounds(self, forward: list[fx.Node], backward: list[fx.Node]) -> None:
        """Write the rounds one after the other. Phases and actions are annotated at the end, because the code before
        that relies on the original phases."""
        ((position, tangent),) = self.program.inputs("tangent").items()
        expected = self.program.add_input("expected", type_of(tangent), f"expected:{position}")
        tangent.replace_all_uses_with(expected)
        self._join_ahead(forward)
        size, sweeps = self.count // self.plan.rounds, list[tuple[list[fx.Node], Phase, str]]()
        for number in range(self.plan.rounds):
            self.now = range(number * size, (number + 1) * size)
            sweeps.append((self._written(forward, "output"), "forward", f"F.{number}"))
            if self.is_last:
                self._turn(tangent, expected)
            phase: Phase = "backward" if self.is_last else "forward"
            sweeps.append((self._written(backward, "gradient"), phase, f"B.{number}"))
        for nodes, phase, action in sweeps:
            for node in nodes:
                annotate(node, phase=phase, action=action)

    def _written(self, nodes: list[fx.Node], kind: str) -> list[fx.Node]:
        """Write one sweep of a round and return its operators."""
        behind, written = self.output.prev, list[fx.Node]()
        self._sweep(nodes, kind)
        while behind.next is not self.output:
            behind = behind.next
            written.append(behind)
        return written

    def _join_ahead(self, forward: list[fx.Node]) -> None:
        """Compute before all rounds what microbatches read of the whole batch, such as its token count. Raises
        SplitError if that depends on parameters or random numbers."""
        wanted = {node for node in forward if node.target in JOINS and self._is_read_by_parts(node)}
        for node in reversed(forward):
            if node in wanted:
                wanted.update(value for value in node.all_input_nodes if value.op == "call_function")
        read = {value for node in wanted for value in node.all_input_nodes}
        if not read.isdisjoint(self.program.inputs("parameter").values()) or any(map(is_random, wanted)):
            raise SplitError("its loss is divided by a value that the model computes from all examples together")
        for node in [node for node in forward if node in wanted]:
            if node.target in JOINS:
                self._join(node)
            else:
                for number in range(self.count if node in self.own else 1):
                    self._copy(node, number)
        self.ahead = wanted
        for node in forward:
            joins = node.target in JOINS or (node not in self.own and not self.late.isdisjoint(node.all_input_nodes))
            if joins and node not in wanted:
                self.late.add(node)

    def _is_read_by_parts(self, join: fx.Node) -> bool:
        """Whether any microbatch depends on a join, directly or through other joins and operators."""
        users = list(join.users)
        return any(user in self.own or self._is_read_by_parts(user) for user in users if user.op == "call_function")

    def _turn(self, tangent: fx.Node, expected: fx.Node) -> None:
        """Write the first node after the turn: the scale. Sums that are already complete, because they depend on no
        example, are finished here."""
        origin = Note(phase="backward")
        self.scale = self.parts.emit(aten.div.Tensor, tangent, expected, like=origin, name="scale")
        for total in dict.fromkeys(self.gradients.values()):
            if not total.outstanding:
                self._complete(total, note(total.gradient))

    # -- writing -------------------------------------------------------------------------------------------

    def _run(self, run: list[fx.Node]) -> None:
        """Write one run of operators for each microbatch in turn; joins cut it into pieces."""
        piece: list[fx.Node] = []
        for node in run:
            if node in self.ahead:
                continue
            if node.target in JOINS:
                self._piece(piece)
                piece = []
                if self.is_last:
                    self._join(node)
            else:
                piece.append(node)
        self._piece(piece)

    def _piece(self, nodes: list[fx.Node]) -> None:
        own = [node for node in nodes if node in self.own]
        for node in nodes:
            if node not in self.own and self._is_due(node):
                self.output.prepend(node)
                self._add_up(node, node)
        draws = draws_forward(own)
        for number in self.now if own else ():
            state = self.states[number] if draws and number < len(self.states) else None
            self.parts.swap(state, own[0])
            for node in own:
                self._add_up(node, self._copy(node, number))
            self.parts.swap(state, own[-1])

    def _is_due(self, node: fx.Node) -> bool:
        """Whether a node that does not depend on examples belongs to the round being written: the last round if it
        depends on all microbatches, otherwise the first."""
        return self.is_last if node in self.late else self.now.start == 0

    def _copy(self, node: fx.Node, number: int) -> fx.Node:
        if number == 0:
            self.output.prepend(node)
            return node
        found = self.copies[number]
        copy = found[node] = self.program.repeat_node(node, lambda value: found.get(value, value), self.output)
        if node.target is MICROBATCH:
            copy.args = (node.args[0], number, self.count)
        return copy

    def _all(self, node: fx.Node) -> list[fx.Node]:
        return [node, *(found[node] for found in self.copies[1:])]

    def _add_up(self, term: fx.Node, value: fx.Node) -> None:
        """Add `value`, one microbatch's or all microbatches' value of `term`, to the gradients that `term` is part
        of."""
        if term in self.totals:
            for total in self.parts.add(term, value, self.totals[term]):
                if self.plan.rounds == 1 or self.scale is not None:
                    self._complete(total, note(term))

    def _complete(self, total: Total, like: Note) -> None:
        """Finish a complete sum: in rounds multiply it by the scale, then round it."""
        if self.scale is not None:
            total.value = self.parts.emit(aten.mul_.Tensor, total.value, self.scale, like=like, name="total")
        total.value = self.parts.rounded(total, like)

    # -- what joins ------------------------------------------------------------------------------------------

    def _join(self, node: fx.Node) -> None:
        value = node.args[0]
        if node.target is AVERAGE and value in self.own:
            value = self.parts.mean(self._all(value), note(node))
        if node.target is AVERAGE and self.plan.batches == 1:
            self.program.replace(node, value)
            return
        node.update_arg(0, value)
        self.output.prepend(node)

    def _join_results(self, kind: str) -> None:
        """Set the results of one kind to those of the whole batch."""
        results = dict(self.program.results)
        for name, value in self.program.results_of(kind).items():
            total = self.gradients.get(f"{kind}:{name}")
            if total is not None:
                results[f"{kind}:{name}"] = total.value
            elif value in self.own:
                results[f"{kind}:{name}"] = self.parts.emit(aten.cat.default, self._all(value), like=note(value))
        self.program.set_results(results)
