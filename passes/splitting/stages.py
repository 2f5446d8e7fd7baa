"""The stages of a pipeline: what the ranks do in which order, and what they send.

Everything here follows from the program and the plan alone, so that all ranks come to the same result.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple

from torch import fx

from ...runtime.isa.linear_cross_entropy import ABSENT
from ...runtime.isa.schedule import Action, Kind, Schedule
from ..program.plan import Plan
from ..program.program import Program, note, tensor_type, type_of
from ..program.types import TensorType
from .assignment import assigned, swaps_of_draws
from .parts import JOINS, of_microbatches, terms
from .steps import Steps


@dataclass(frozen=True)
class Made:
    """The value of a node for one microbatch (None: for all of them), at its place in a rank's program."""

    node: fx.Node
    microbatch: int | None = None


@dataclass(frozen=True)
class Sum:
    """The completion of a rank's part of a gradient: the sum of the terms that its stages contribute."""

    gradient: fx.Node


@dataclass(frozen=True)
class Output:
    """An output of the model, for the whole batch."""

    role: str


Item = Made | Sum | Output


class Sent(NamedTuple):
    """A message between two ranks of the pipeline.

    Fields:
        item: what is sent.
        to: the receiving rank.
        at: the index in `Stages.items` of the sender's action that sends it: parts of gradients that are `waiting` in
            front of it, all else when it is made. The end comes behind the last action.
        early: whether that is before the sender's turn.
        by: the index of the receiver's action by whose end it has been received, with the turn counted as one; infinity
            if that is not certain.
    """

    item: Item
    to: int
    at: int
    early: bool
    by: float


class Stages:
    """The stages of a program. `stage` maps each operator that belongs to a stage to its number."""

    def __init__(self, program: Program, plan: Plan) -> None:
        assert plan.schedule is not None
        self.program, self.plan = program, plan
        self.schedule: Schedule = plan.schedule
        self.own = of_microbatches(program)
        self.drawn_in = swaps_of_draws(program)
        self.stage = assigned(program, plan)
        for swap, drawing in self.drawn_in.items():
            self.stage[swap] = self.stage[drawing]
        self.needed = self._needed()
        self.early = self._of_inputs() if self._inputs_first else set[fx.Node]()
        self.work = self._work()

    def rank_of(self, node: fx.Node, microbatch: int | None = None) -> int:
        """The rank that makes the value of a stage's operator for a microbatch (None: for all of them)."""
        if node.target in JOINS:
            return self.joiner(node)
        return self.schedule.runner(Action(self.stage[node], microbatch or 0, self._kind(node)))

    def joiner(self, node: fx.Node) -> int:
        """The rank that joins a stage's values of all microbatches: the one that runs its last forward."""
        return self.schedule.runner(Action(self.stage[node], self.plan.microbatches - 1, "F"))

    def ranks_of(self, node: fx.Node) -> list[int]:
        """The ranks that make the value of a stage's operator, by microbatch, or the one that makes it for all of
        them."""
        if node in self.own:
            return [self.rank_of(node, microbatch) for microbatch in range(self.plan.microbatches)]
        return [self.rank_of(node)]

    def _kind(self, node: fx.Node) -> Kind:
        """The kind of action that an operator is part of."""
        if note(node).phase == "forward":
            return "F"
        if not self.schedule.splits_backward:
            return "B"
        return "I" if node in self.early else "W"

    @property
    def _inputs_first(self) -> bool:
        """Whether gradients of inputs are computed before those of weights. In backwards of one piece they are where
        weights live on the hosts: stages are small there, so that little is held meanwhile, and messages many."""
        return self.schedule.splits_backward or self.schedule.weights == "host"

    # -- what each action is of ----------------------------------------------------------------------------

    def _needed(self) -> set[fx.Node]:
        """All nodes that the results depend on. A generator swap is needed if the draw inside it is."""
        swaps = defaultdict[fx.Node, list[fx.Node]](list)
        for swap, drawing in self.drawn_in.items():
            swaps[drawing].append(swap)
        frontier = [value for value in self._roots() if isinstance(value, fx.Node)]
        needed: set[fx.Node] = set()
        while frontier:
            node = frontier.pop()
            if node not in needed:
                needed.add(node)
                frontier += [*node.all_input_nodes, *swaps[node]]
        return needed

    def _roots(self) -> Iterator[fx.Node]:
        for role, node in self.program.results.items():
            yield from terms(node) if role.startswith("gradient:") else (node,)

    def _work(self) -> dict[tuple[int, str], list[fx.Node]]:
        """The operators by stage and kind of action, without those that join microbatches: in program order, but of a
        backward first those that other stages wait for, if there are `early` ones."""
        work = defaultdict[tuple[int, str], list[fx.Node]](list)
        for node in self.program.computes:
            if node in self.needed and node in self.stage and node.target not in JOINS:
                work[self.stage[node], self._kind(node)].append(node)
        if self.early:
            for nodes in work.values():
                nodes.sort(key=lambda node: note(node).phase == "backward" and node not in self.early)
        return work

    def _of_inputs(self) -> set[fx.Node]:
        """The backward operators that other stages depend on: those of the actions I (gradients of inputs), or the
        first ones of a backward of one piece."""
        early: set[fx.Node] = set()
        for node in reversed(self.program.computes):
            backward = note(node).phase == "backward" and node in self.stage and node in self.needed
            if backward and any(self._waits(user, node, early) for user in self._readers(node)):
                early.add(node)
        for swap, drawing in self.drawn_in.items():
            if drawing in early:
                early.add(swap)
        return early

    def _waits(self, user: fx.Node, node: fx.Node, early: set[fx.Node]) -> bool:
        return user in early or self.stage[user] != self.stage[node]

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """The readers of a value that belong to a stage and are needed."""
        return (user for user in node.users if user in self.stage and user in self.needed)

    # -- what ranks do, and send each other ----------------------------------------------------------------

    def items(self, rank: int) -> Iterator[tuple[Action | None, list[Item]]]:
        """What a rank makes, action by action; the turn has the action None. Outputs come as early as possible."""
        actions, turn, once = self.schedule.ranks[rank], self.schedule.turn(rank), set[fx.Node]()
        # A rank of a host-weights schedule joins what others make, and waits for it once all forwards are done.
        last = turn - 1 if self.schedule.weights == "host" else self.schedule.last_forward(rank)
        outstanding = self._outstanding(rank)
        for i, action in enumerate(actions):
            if i == turn:
                yield None, []
            yield action, [*self._items_of(action, once, outstanding), *(self._outputs(rank) if i == last else ())]
        if turn == len(actions):
            yield None, []

    def _items_of(self, action: Action, once: set[fx.Node], outstanding: dict[fx.Node, int]) -> Iterator[Item]:
        for node in self.work[action.stage, action.kind]:
            is_own = node in self.own
            if not is_own and node in once:
                continue
            once.add(node)
            yield Made(node, action.microbatch if is_own else None)
            for gradient in self._gradients[node]:
                outstanding[gradient] -= 1 if is_own else self.plan.microbatches
                if not outstanding[gradient]:
                    yield Sum(gradient)

    def _outputs(self, rank: int) -> list[Item]:
        """The outputs that this rank joins."""
        outputs = self.program.results_of("output").items()
        return [Output(role) for role, node in outputs if node in self.stage and self.joiner(node) == rank]

    def sends(self, rank: int) -> Iterator[Sent]:
        """What a rank sends, in order. Messages to one rank are received in the order in which they are sent.

        Where weights live on the hosts, parts of gradients do not hold up what is needed sooner: a stage's are sent a
        few at a time, in front of the next actions, and received beside one.
        """
        early, messages, first = True, list[Sent](), defaultdict[int, float](int)  # where the next may be received
        waiting, pace = defaultdict[int, deque[Item]](deque), defaultdict[int, int](int)

        def send(item: Item, to: int, at: int, by: float) -> None:
            first[to] = max(first[to], by + (not isinstance(item, Sum)))
            messages.append(Sent(item, to, at, early, by))

        end = len(self.schedule.ranks[rank]) + 1
        for place, (action, items) in enumerate(self.items(rank)):
            for to, parts in waiting.items():
                for part in [parts.popleft() for _ in range(min(pace[to], len(parts)))]:
                    send(part, to, place, self.steps.next_place(to, first[to], self.steps.begins(rank, place)))
            for item in items:
                for to in (to for to in self._receivers(item) if to != rank):
                    if isinstance(item, Sum) and self.schedule.weights == "host":
                        waiting[to].append(item)
                        pace[to] = -(-len(waiting[to]) // self.plan.microbatches)
                    else:
                        send(item, to, place, self._read_by(item, to, early))
            early = early and action is not None
        for to, parts in waiting.items():
            for part in parts:
                send(part, to, end, inf)
        soonest = defaultdict[int, float](lambda: inf)
        for i, sent in reversed(list(enumerate(messages))):
            soonest[sent.to] = min(soonest[sent.to], sent.by)
            messages[i] = sent._replace(by=soonest[sent.to])
        return iter(messages)

    def _read_by(self, item: Item, rank: int, early: bool) -> float:
        """The index of the first action in which `rank` is sure to read an item sent to it; infinity if none is."""
        turn, places = self.schedule.turn(rank), list[float]()
        if isinstance(item, Made):
            every = range(self.plan.microbatches) if item.microbatch is None else (item.microbatch,)
            users = [user for user in self._readers(item.node) if user.target not in JOINS]
            actions = (Action(self.stage[user], microbatch, self._kind(user)) for user in users for microbatch in every)
            places += (self._place[action] for action in actions if self.schedule.runner(action) == rank)
        return min([*places, *([turn] if early or isinstance(item, Output) else [])], default=inf)

    @cached_property
    def steps(self) -> Steps:
        return Steps(self.schedule)

    @cached_property
    def _place(self) -> dict[Action, int]:
        """The index of each action among those of its rank, counting the turn."""
        ranks = enumerate(self.schedule.ranks)
        return {
            action: i + (i >= self.schedule.turn(rank)) for rank, actions in ranks for i, action in enumerate(actions)
        }

    def _receivers(self, item: Item) -> list[int]:
        match item:
            case Made(node, microbatch):
                readers = [user for user in self._readers(node) if user.target is not ABSENT]
                ranks = {self.rank_of(user, microbatch) for user in readers}
                return sorted(ranks | {self.joiner(node)} if node in self._returned else ranks)
            case Sum(gradient):
                return self.owners(gradient)
            case Output(role):
                everyone = list(range(len(self.schedule.ranks)))
                return everyone if self.is_told(self.program.results[f"output:{role}"]) else []

    @cached_property
    def _returned(self) -> frozenset[fx.Node]:
        """What the model's outputs are made of; every message asks."""
        return frozenset(self.program.results_of("output").values())

    def is_told(self, output: fx.Node) -> bool:
        """Whether all ranks get an output: a scalar such as the loss, or any if the request asks for all outputs."""
        return is_number(output) or self.plan.request.outputs == "all"

    # -- parameters ----------------------------------------------------------------------------------------

    @cached_property
    def _gradients(self) -> dict[fx.Node, list[fx.Node]]:
        """For each term, the gradients that it is part of."""
        found = defaultdict[fx.Node, list[fx.Node]](list)
        for gradient in dict.fromkeys(self.program.results_of("gradient").values()):
            for term in terms(gradient):
                found[term].append(gradient)
        return found

    def share(self, term: fx.Node, rank: int) -> int:
        """For how many microbatches a rank contributes a term; a term that is the same for all counts for each."""
        each = 1 if term in self.own else self.plan.microbatches
        return each * self.ranks_of(term).count(rank)

    def _outstanding(self, rank: int) -> dict[fx.Node, int]:
        """For each gradient, how many values a rank's part is the sum of."""
        gradients = dict.fromkeys(self.program.results_of("gradient").values())
        return {node: sum(self.share(term, rank) for term in terms(node)) for node in gradients}

    def holders(self, gradient: fx.Node) -> list[int]:
        """The ranks that contribute to a gradient."""
        return sorted({rank for term in terms(gradient) for rank in self.ranks_of(term)})

    def owners(self, gradient: fx.Node) -> list[int]:
        """The ranks that hold a parameter with this gradient, each of which updates it. They include ranks that
        contribute nothing, because what they compute from the parameter reaches the loss through another rank's stage
        or has no gradient."""
        names = (name for name, node in self.program.results_of("gradient").items() if node is gradient)
        return sorted(set().union(*(self._owners[name] for name in names)))

    def gradients_elsewhere(self, rank: int) -> Iterator[tuple[str, fx.Node]]:
        """The gradients, with their roles, of a rank's parameters to which it does not contribute."""
        for name, gradient in self.program.results_of("gradient").items():
            if name in self._owners and rank in self._owners[name] and rank not in self.holders(gradient):
                yield f"gradient:{name}", gradient

    def parameters(self, rank: int) -> frozenset[str]:
        """The names of the parameters that a rank reads or has gradients of. The first stage's rank also has those that
        nobody reads."""
        return frozenset(name for name, owners in self._owners.items() if rank in owners)

    def _readers_of(self, user: fx.Node) -> Iterable[int]:
        """The ranks that read what a stage's operator reads. Where weights live on the hosts, these are all that run
        the stage: an evaluation, which may come first, does not show what backwards read."""
        if self.schedule.weights == "rank":
            return self.ranks_of(user)
        return (rank for rank in range(len(self.schedule.ranks)) if self.stage[user] in self.schedule.stages_of(rank))

    @cached_property
    def _owners(self) -> dict[str, set[int]]:
        """For each parameter's name, the ranks that hold it."""
        read = defaultdict[str, set[int]](set)
        for name, node in self.program.inputs("parameter").items():
            frontier = [node]
            while frontier:
                for user in frontier.pop().users:
                    if user in self.stage and user in self.needed:
                        read[name].update(self._readers_of(user))
                    elif user.op == "call_function" and user not in self.stage:
                        frontier.append(user)
        for name, gradient in self.program.results_of("gradient").items():
            read[name].update(self.holders(gradient))
        first = self.schedule.runner(Action(0, 0, "F"))
        return {name: read[name] or {first} for name in self.program.inputs("parameter")}


def is_number(node: fx.Node) -> bool:
    type = type_of(node)
    return isinstance(type, TensorType) and type.shape == () and tensor_type(node).dtype.is_floating_point
