"""Run a batch as microbatches through the stages of a pipeline: keep one rank's part, in its schedule's order.

    before, for two ranks: F0.0 F0.1 B0.0 B0.1            after, on rank 0
                           F1.0 B1.0 F1.1 B1.1
    # forward: layers.0                                   # forward F0.0: layers.0
    x = geminifx.microbatch(batch, 0, 2)                  x = geminifx.microbatch(batch, 0, 2)
    h = aten.mm.default(x, w)                             h = aten.mm.default(x, w)
    # forward: layers.1                                   geminifx.send(h, 1)
    y = aten.mm.default(h, v)                             # forward F0.1: layers.0
    ...                                                   ... x_1, h_1 likewise
    # backward: layers.1                                  # forward B0.0: layers.0
    dv = aten.mm.default(ht, dy)                          dh = geminifx.receive([2, 4], [4, 1], torch.float32, 1)
    dh = aten.mm.default(dy, vt)                          geminifx.finish_send(h, 1)
    # backward: layers.0                                  dw = aten.mm.default(xt, dh)
    dw = aten.mm.default(xt, dh)                          total = aten._to_copy.default(dw, dtype=torch.float32)
                                                          # backward
                                                          scale = aten.div.Tensor(tangent, expected)
                                                          # backward B0.1: layers.0
                                                          ... dh_1, dw_1, total_1 likewise
                                                          total_2 = aten.mul_.Tensor(total_1, scale)
    return {"gradient:layers.0.weight": dw, ...}          return {"gradient:layers.0.weight": total_2}

A value that is made in one rank's stage and read in another's is sent as soon as it exists. It is received in front of
its first reader, after everything sent before it. A message travels with its dimensions in the order of its memory, and
both ends see it permuted, so that nothing is copied. The sender waits for a send once the other rank has sent something
back that it made after receiving it, or at its turn or the end of the program. Before either, every rank receives all
that has been sent to it up to then, so no two ranks wait for each other. A parameter that stages of several ranks read
lives on each of them; they exchange their parts of its gradient, and all sum them in the order of the ranks.

The turn comes right before the first of the rank's gradients would be complete. Backwards before it cannot know the
tangent yet, so all backwards use the expected one: 1, or the loss scale of float16. After the turn, the gradient sums
that leave the program are multiplied by the ratio of the actual tangent to the expected one.

Where weights live on the hosts, each is updated by the rank that runs its stage's forwards and by the one that runs the
backwards. The sums that these exchange are sent a few in front of each action, received beside one, and added up at
once, so that a rank holds those of a few stages at a time, whatever its share of the model is.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from math import inf, prod

from torch import fx

from ..runtime.isa.errors import ShardingError
from ..runtime.isa.instructions import AVERAGE, FINISH_SEND, MICROBATCH, RECEIVE, SEND
from ..runtime.isa.layout import contiguous_stride
from ..runtime.isa.linear_cross_entropy import ABSENT
from ..runtime.isa.precision import accumulate_dtype
from ..runtime.isa.schedule import Action
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Note, Phase, Program, annotate, note, tensor_type, type_of
from .program.types import TensorType, memory_order
from .program.verify import canonical
from .splitting.draws import draw_ahead
from .splitting.fitting import check_fit
from .splitting.parts import Parts, Total, aten, draws_forward
from .splitting.stages import Item, Made, Output, Sent, Stages, Sum

_FORWARD: Phase = "forward"
_BACKWARD: Phase = "backward"


@graph_pass(requires=(canonical,))
def split_stages(program: Program, plan: Plan) -> None:
    if plan.schedule is not None:
        check_fit(program, plan.schedule)
        _Cut(program, plan).run()


class _Cut:
    """A walk along one rank's line of the schedule that writes its program after the old nodes.

    `values` maps a rank and an item it made to the node here that made or received it. `incoming` are the messages
    still to come from each other rank, `outgoing` those still to send, both in order. `sums` are gradients of which
    some ranks' parts are added up, `awaited` the ranks whose parts are not yet. `under_way` are the sends not yet
    waited for, by receiver.
    """

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program, self.plan, self.rank = program, plan, plan.line
        self.parts = Parts(program, plan.microbatches)
        self.stages = Stages(program, plan)
        self.gradients, self.totals = self.parts.totals(lambda term: self.stages.share(term, self.rank))
        elsewhere: dict[fx.Node, Total] = {}  # one node may be the gradient of several parameters
        for role, gradient in self.stages.gradients_elsewhere(self.rank):
            self.gradients[role] = elsewhere.setdefault(gradient, Total(gradient, 0))
        self.by_gradient = {total.gradient: total for total in self.gradients.values()}
        self.awaited: dict[Total, deque[int]] = {}
        self.sums: dict[Total, fx.Node] = {}
        self.values: dict[tuple[int, Item], fx.Node] = {}
        self.outgoing = deque(self.stages.sends(self.rank))
        self.under_way = defaultdict[int, deque[tuple[fx.Node, Sent]]](deque)
        self.incoming = {
            rank: deque(sent for sent in self.stages.sends(rank) if sent.to == self.rank)
            for rank in range(len(self.stages.schedule.ranks)) if rank != self.rank
        }  # fmt: skip
        self.place = 0  # among the rank's actions and its turn
        self.expected: fx.Node | None = None
        self.scale: fx.Node | None = None  # actual tangent / expected tangent; set after the turn

    def run(self) -> None:
        old, parameters = self.program.nodes, self.stages.parameters(self.rank)
        results, phase = dict[str, fx.Node](), _FORWARD
        for position, tangent in self.program.inputs("tangent").items():
            self.expected = self.program.add_input("expected", type_of(tangent), f"expected:{position}")
        saved, self.states = draw_ahead(self.parts, self.stages)
        self.values |= {(self.rank, item): state for item, state in saved.items()}
        for self.place, (action, items) in enumerate(self.stages.items(self.rank)):  # noqa: B020
            behind = self.program.output.prev
            if action is None:
                results |= self._outputs() | self._buffers()
                self._finish_all_sends()
                self._mark(behind, _FORWARD)
                phase = _BACKWARD
                behind = self.program.output.prev
                self._begin_behind()
            else:
                if self.scale is not None and self.stages.schedule.weights == "host":
                    self._exchange_sums()
                self._run(action, items)
            self._mark(behind, phase, action)
        self.place += 1
        behind = self.program.output.prev
        self._send()
        results |= self._gradients()
        self._finish_all_sends()
        self._mark(behind, phase)
        self.program.set_results({role: results[role] for role in self.program.results if role in results})
        self._erase(old, parameters)

    def _mark(self, behind: fx.Node, phase: Phase, action: Action | None = None) -> None:
        """Annotate every node after `behind` with its side of the turn and its action."""
        while behind.next is not self.program.output:
            behind = behind.next
            annotate(behind, phase=phase, action=str(action or ""))

    def _erase(self, old: list[fx.Node], parameters: frozenset[str]) -> None:
        others = {node for name, node in self.program.inputs("parameter").items() if name not in parameters}
        for node in reversed(old):
            if node.op == "call_function" or node in others:
                self.program.graph.erase_node(node)

    def _exchange_sums(self) -> None:
        """In front of an action, send and receive the parts of gradients whose place it is, and wait for what has been
        sent and is received in earlier steps."""
        self._send()
        for source, messages in self.incoming.items():
            while messages and isinstance(messages[0].item, Sum) and messages[0].by <= self.place:
                self._receive_next(source)
        for to in self.under_way:
            self._finish_sends(to, self._is_past)

    def _is_past(self, sent: Sent) -> bool:
        """Whether the action by whose end a message is received ends, in steps, before the one here begins."""
        steps = self.stages.steps
        return sent.by < inf and steps.ends(sent.to, int(sent.by)) <= steps.begins(self.rank, self.place)

    # -- actions -------------------------------------------------------------------------------------------

    def _run(self, action: Action, items: list[Item]) -> None:
        made = [item.node for item in items if isinstance(item, Made)]
        draws = action.kind == "F" and draws_forward(made)
        state = self.states[action.stage, action.microbatch] if draws else None
        self.parts.swap(state, made[0] if made else self.program.output)
        for item in items:
            if isinstance(item, Made):
                self._keep(item, self._copy(item))
                self._add_up(item)
            elif isinstance(item, Sum):
                self._complete(item)
            else:
                self._keep(item, self._joined(self.program.results[f"output:{item.role}"]))
        self.parts.swap(state, made[-1] if made else self.program.output)

    def _copy(self, item: Made) -> fx.Node:
        value = lambda node: self._value(node, item.microbatch)  # noqa: E731
        copy = self.program.repeat_node(item.node, value, self.program.output)
        if item.node.target is MICROBATCH:
            copy.args = (copy.args[0], item.microbatch, self.plan.microbatches)
        return copy

    def _keep(self, item: Item, value: fx.Node) -> None:
        """Record a value that now exists, and send it to the ranks that read it, now or in a later place."""
        self.values[self.rank, item] = value
        self._send()

    def _send(self) -> None:
        """Send what is next, as far as it exists and its place has come."""
        while self.outgoing and self.outgoing[0].at <= self.place:
            value = self.values.get((self.rank, self.outgoing[0].item))
            if value is None:
                break
            sent, order = self.outgoing.popleft(), memory_order(tensor_type(value))
            message = (
                self.parts.emit(aten.permute.default, value, order, like=note(value))
                if order != sorted(order)
                else value
            )
            self.parts.emit(SEND, message, sent.to, like=note(value))
            self.under_way[sent.to].append((message, sent))

    def _finish_sends(self, to: int, is_received: Callable[[Sent], bool]) -> None:
        """Wait for the first messages to rank `to`, as far as it has received them."""
        messages = self.under_way[to]
        while messages and is_received(messages[0][1]):
            self.parts.emit(FINISH_SEND, messages.popleft()[0], to, like=Note())

    def _finish_all_sends(self) -> None:
        """Wait for all sends: at the turn and at the end, where every rank has received everything sent before."""
        for to in self.under_way:
            self._finish_sends(to, lambda sent: True)

    def _value(self, node: fx.Node, microbatch: int | None) -> fx.Node:
        """A microbatch's value of a node: made or received here or, if the node belongs to no stage, made here on
        demand."""
        if node.op == "placeholder":
            return self.expected if note(node).role.startswith("tangent:") else node
        item = Made(node, microbatch if node in self.parts.own else None)
        if node in self.stages.stage:
            return self._received(item, self.stages.rank_of(node, item.microbatch))
        if (self.rank, item) not in self.values:
            value = self._joined(node) if node.target is AVERAGE else self._copy(item)
            self.values[self.rank, item] = value
        return self.values[self.rank, item]

    def _received(self, item: Item, source: int) -> fx.Node:
        """The value of an item that rank `source` made. If that is another rank, everything it sends before is received
        first."""
        while (source, item) not in self.values:
            if not self.incoming.get(source):
                raise ShardingError(
                    f"rank {self.rank} of the schedule {self.stages.schedule.name} reads {item}, which rank {source} "
                    "produces later or never; every action must come after those that it depends on"
                )
            self._receive_next(source)
        return self.values[source, item]

    def _receive_next(self, source: int) -> None:
        sent = self.incoming[source].popleft()
        self.values[source, sent.item] = self._receive(sent.item, source)
        self._finish_sends(source, lambda other: other.by < sent.at)
        if isinstance(sent.item, Sum):
            self._sum(self.by_gradient[sent.item.gradient])

    def _receive(self, item: Item, source: int) -> fx.Node:
        match item:
            case Made(node):
                type, name = tensor_type(node), node.name
            case Sum(gradient):
                type, name = tensor_type(gradient), "total"
                type = TensorType(accumulate_dtype(type.dtype), type.shape, contiguous_stride(type.shape))
            case Output(role):
                type, name = tensor_type(self.program.results[f"output:{role}"]), "output"
        if type.num_bytes < type.dtype.itemsize * prod(type.shape):
            raise ShardingError(
                f"{name}, whose elements overlap in memory (as of expand()), is read in another stage; make it "
                ".contiguous() in the model"
            )
        order = memory_order(type)
        shape, stride = [type.shape[dim] for dim in order], [type.stride[dim] for dim in order]
        message = self.parts.emit(RECEIVE, shape, stride, type.dtype, source, like=Note(), name=name)
        if order == sorted(order):
            return message
        return self.parts.emit(
            aten.permute.default, message, [order.index(dim) for dim in range(len(order))], like=Note()
        )

    # -- results -------------------------------------------------------------------------------------------

    def _outputs(self) -> dict[str, fx.Node]:
        """The outputs by role, with `absent` for those that other ranks keep. All messages sent before their senders'
        turns are received here too, so that a loop that never runs backward leaves none behind."""
        found = {}
        for role, node in self.program.results_of("output").items():
            found[f"output:{role}"] = self._output(role, node)
        for source, messages in self.incoming.items():
            while messages and messages[0].early:
                self._receive_next(source)
        return found

    def _output(self, role: str, node: fx.Node) -> fx.Node:
        if node not in self.stages.stage:
            return self._joined(node)
        source = self.stages.joiner(node)
        if source == self.rank or self.stages.is_told(node):
            return self._received(Output(role), source)
        return self.parts.emit(ABSENT, self._any_input, like=Note())

    @property
    def _any_input(self) -> fx.Node:
        return next(iter(self.program.inputs("input").values()))

    def _joined(self, node: fx.Node) -> fx.Node:
        """A value of the whole batch: the mean or the concatenation of the microbatches' values."""
        if node.target is ABSENT:
            return self.parts.emit(ABSENT, self._any_input, like=note(node))
        value = node.args[0] if node.target is AVERAGE else node
        if value not in self.parts.own:
            return self._averaged(node, self._value(value, None))
        every = [self._value(value, microbatch) for microbatch in range(self.plan.microbatches)]
        if len(every) == 1:
            return self._averaged(node, every[0])
        if node.target is AVERAGE:
            return self._averaged(node, self.parts.mean(every, note(node)))
        return self.parts.emit(aten.cat.default, every, like=note(node))

    def _averaged(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """`value`, averaged over the ranks with other batches if `node` is an average."""
        between = node.target is AVERAGE and self.plan.batches > 1
        return self.parts.emit(AVERAGE, value, like=note(node)) if between else value

    def _buffers(self) -> dict[str, fx.Node]:
        found = self.program.results_of("mutation")
        for name, node in found.items():
            if node in self.stages.stage:
                raise ShardingError(
                    f"the buffer {name} is written by a stage of the pipeline, and the ranks of other stages would "
                    "keep its old values; compute the value in the forward instead of storing it in a buffer, or "
                    "leave pipeline= out of parallel="
                )
        return {f"mutation:{name}": self._value(node, None) for name, node in found.items()}

    # -- gradients -----------------------------------------------------------------------------------------

    def _add_up(self, item: Made) -> None:
        if item.node in self.totals:
            list(self.parts.add(item.node, self.values[self.rank, item], self.totals[item.node]))

    def _complete(self, item: Sum) -> None:
        """Record this rank's part of a gradient, now complete, and add it up if the turn is past."""
        total = self.by_gradient[item.gradient]
        assert total.value is not None
        self._keep(item, total.value)
        self._sum(total)

    def _begin_behind(self) -> None:
        """Write the first node after the turn, the scale, and apply it to the gradients that are already complete."""
        if self.expected is None:
            return
        tangent = next(iter(self.program.inputs("tangent").values()))
        self.scale = self.parts.emit(aten.div.Tensor, tangent, self.expected, like=Note(), name="scale")
        for total in self.by_gradient.values():
            self._sum(total)

    def _gradients(self) -> dict[str, fx.Node]:
        for total in self._by_arrival():
            for rank in self.stages.holders(total.gradient):
                self._received(Sum(total.gradient), rank)
        values = {role: total.value for role, total in self.gradients.items()}
        lost = [role for role, value in values.items() if value is None]
        assert not lost, f"nobody has brought {', '.join(lost)} to rank {self.rank}"
        return {role: value for role, value in values.items() if value is not None}

    def _by_arrival(self) -> list[Total]:
        """The gradients in the order in which their parts arrive, so that buffers are freed early."""
        coming = [sent.item for messages in self.incoming.values() for sent in messages]
        places = {item.gradient: i for i, item in enumerate(coming) if isinstance(item, Sum)}
        return sorted(self.by_gradient.values(), key=lambda total: places.get(total.gradient, -1))

    def _sum(self, total: Total) -> None:
        """Add up those parts of a gradient that have come, in the order of the ranks, so that all ranks get the same
        bits; and scale the sum of all. Nothing is added before the turn."""
        if self.scale is None:
            return
        item, awaited = Sum(total.gradient), self.awaited.setdefault(total, deque(self.stages.holders(total.gradient)))
        while awaited and (awaited[0], item) in self.values:
            part, first = self.values[awaited.popleft(), item], self.sums.get(total)
            if first is None:
                self.sums[total] = part
            else:
                add = aten.add.Tensor if self._is_sent(first, total) else aten.add_.Tensor
                self.sums[total] = self.parts.emit(add, first, part, like=note(total.gradient), name="total")
            if not awaited:
                total.value = self.sums.pop(total)
                self._scale(total)

    def _scale(self, total: Total) -> None:
        """Multiply a gradient by actual / expected tangent, then round it."""
        origin = note(total.gradient)
        multiply = aten.mul.Tensor if self._is_sent(total.value, total) else aten.mul_.Tensor
        total.value = self.parts.emit(multiply, total.value, self.scale, like=origin, name="total")
        total.value = self.parts.rounded(total, origin)

    def _is_sent(self, value: fx.Node | None, total: Total) -> bool:
        """Whether a value is this rank's part of a gradient and may still be on its way to others, so that nothing may
        overwrite it."""
        is_own = value is self.values.get((self.rank, Sum(total.gradient)))
        return is_own and self.stages.owners(total.gradient) != [self.rank]
