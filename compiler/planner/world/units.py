"""The costs of a model's parts, counted from one captured step: the operators of each block's forward and backward, its
parameters, what it keeps for the backward, and what it gets from the blocks before it."""

import operator
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import fx

from ....passes.program.plan import Plan
from ....passes.program.program import Program, aliased_inputs, note, tensor_type, type_of
from ....passes.program.types import TensorType
from ....passes.splitting.parts import block_finder, terms
from ....passes.splitting.stages import Stages
from ....runtime.isa.schedule import Action, Schedule
from ...rates.rates import Rates
from ..costs import IN_PARTS, MOVED, flops, is_free, num_bytes, product_dtype, product_share, weighed_bytes
from ..storages import tensors_of

Kind = Literal["F", "I", "W"]


class Operator(NamedTuple):
    """An operator's costs, which can be scaled to other batches and divided between processes.

    Fields:
        flops, num_bytes: what it computes, and what it reads and writes, weighed as by `costs.weighed_bytes`.
        weight_bytes: the part of `num_bytes` that does not grow with the batch.
        dtype: the dtype of its products.
        product_share: see `costs.product_share`.
        in_parts: whether it is in `costs.IN_PARTS`.
        is_wide: whether it has no FLOP, and a result as large as what blocks pass on; mode "1d" does not shard it.
    """

    flops: int
    num_bytes: float
    weight_bytes: float
    dtype: torch.dtype
    product_share: float
    in_parts: bool
    is_wide: bool

    def seconds(self, rates: Rates, rows: float, parts: int, wide_parts: int) -> float:
        """Seconds for `rows` times the examples, divided over `parts` processes, or over `wide_parts` if it is wide."""
        parts = wide_parts if self.is_wide else parts
        products_s = rates.products(self.dtype).seconds(self.flops * rows / parts) / self.product_share
        memory_s = ((self.num_bytes - self.weight_bytes) * rows + self.weight_bytes) / parts / rates.memory_bytes_per_s
        return rates.kernel_s + (products_s + memory_s if self.in_parts else max(products_s, memory_s))


@dataclass
class Unit:
    """A block of the model, or what goes beside one, such as an embedding or the loss.

    Fields:
        work: the operators of the forward (F), gradients of inputs (I) and gradients of weights (W), with their counts.
        parameters, trained: elements by name, of all parameters and of the trained ones.
        kept_bytes, kept_wide_bytes: what the backward reads of the forward, and the part as large as what blocks pass
            on.
        logits_bytes: what is kept for a loss over a vocabulary that may be computed in pieces.
        given_bytes: what it reads of earlier blocks, which is all that is kept where it is recomputed.
        crossing_bytes: what crosses its beginning, to be read by it or by later blocks.
        sums: additions of two values as large as what blocks pass on; each is an all-reduce in mode "1d".
        products, product_bytes, product_weights: the number of products with weights in its forward, the bytes of
            activations that they read, and the elements of weights.
    """

    work: dict[Kind, Counter[Operator]] = field(
        default_factory=lambda: {"F": Counter(), "I": Counter(), "W": Counter()}
    )
    parameters: dict[str, int] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    kept_bytes: int = 0
    kept_wide_bytes: int = 0
    logits_bytes: int = 0
    given_bytes: int = 0
    crossing_bytes: int = 0
    sums: int = 0
    products: int = 0
    product_bytes: int = 0
    product_weights: int = 0

    @property
    def numel(self) -> int:
        return sum(self.parameters.values())

    @property
    def trained_numel(self) -> int:
        return sum(self.trained.values())

    def add_parameter(self, name: str, numel: int, is_trained: bool) -> None:
        self.parameters[name] = numel
        if is_trained:
            self.trained[name] = numel


@dataclass(frozen=True)
class Units:
    """The units of a captured step.

    Fields:
        examples: the examples of the captured batch.
        weight_bytes: bytes per element of most weights.
        wide_bytes: bytes of what blocks pass on.
        of_block, beside: by block, its own unit, and the unit of what goes beside it.
    """

    examples: int
    weight_bytes: int
    wide_bytes: int
    of_block: dict[str, Unit]
    beside: dict[str, Unit]


def measured(program: Program, blocks: tuple[str, ...], examples: int, saved_bytes: int) -> Units:
    """Counts the units of a captured step. `saved_bytes` are those of logits that a loss in pieces would save."""
    return _Counting(program, blocks, saved_bytes).units(examples)


class _Counting:
    """Counts a program's units, with each block as a pipeline stage of its own."""

    def __init__(self, program: Program, blocks: tuple[str, ...], saved_bytes: int) -> None:
        self.program, self.blocks, self.saved_bytes = program, blocks or ("",), saved_bytes
        self.stages = Stages(
            program, Plan(blocks=blocks, stages=("", *blocks[1:]), schedule=_divided(len(self.blocks)))
        )
        self.block_of = block_finder(blocks)
        self.views = _views_of_parameters(program)
        self.wide = self._wide()
        self.gradients = self._gradients()
        self.of_block = {block: Unit() for block in self.blocks}
        self.beside = {block: Unit() for block in self.blocks}

    def units(self, examples: int) -> Units:
        for (stage, kind), nodes in self.stages.work.items():
            for node in nodes if kind in get_args(Kind) else ():
                self._count(self._unit(node, stage), cast(Kind, kind), node)
        self._add_parameters()
        self._add_values()
        dtypes = Counter[int]()
        for node in self.program.inputs("parameter").values():
            dtypes[tensor_type(node).dtype.itemsize] += prod(tensor_type(node).shape)
        itemsize = dtypes.most_common(1)[0][0] if dtypes else torch.float32.itemsize
        return Units(examples, itemsize, self.wide * itemsize, self.of_block, self.beside)

    def _unit(self, node: fx.Node, stage: int) -> Unit:
        """The unit that a node counts to: the one of its stage's block, or the one beside that."""
        block, module = self.blocks[stage], note(node).module
        return (self.beside if _is_beside(module, self.block_of(module), stage, len(self.blocks)) else self.of_block)[
            block
        ]

    def _count(self, unit: Unit, kind: Kind, node: fx.Node) -> None:
        if is_free(node):
            return
        unit.work[kind][self._operator(node)] += 1
        operands = [type_of(value) for value in node.all_input_nodes]
        if kind != "F":
            return
        if node.target is torch.ops.aten.add.Tensor and sum(_numel(type) == self.wide for type in operands) == 2:
            unit.sums += 1
        weights = [value for value in node.all_input_nodes if value in self.views]
        if flops(node) and weights:
            weighty = sum(prod(tensor_type(value).shape) for value in weights)
            unit.products += 1
            unit.product_weights += weighty
            unit.product_bytes += sum(t.num_bytes for type in operands for t in tensors_of(type)) - sum(
                tensor_type(value).num_bytes for value in weights
            )

    def _operator(self, node: fx.Node) -> Operator:
        flop, moved = flops(node), weighed_bytes(node)
        types = [t for t in tensors_of(type_of(node)) if t.dtype.is_floating_point]
        weight_bytes = sum(tensor_type(value).num_bytes for value in node.all_input_nodes if value in self.views)
        weight_bytes += sum(t.num_bytes for t in types) if node in self.gradients else 0
        share = min(1.0, weight_bytes / max(num_bytes(node), 1))
        fixed = 0.0 if node.target in MOVED and node not in self.gradients else moved * share
        wide = not flop and any(_numel(t) == self.wide for t in types)
        return Operator(flop, moved, fixed, product_dtype(node), product_share(node), node.target in IN_PARTS, wide)

    def _wide(self) -> int:
        """Elements of what blocks pass on: the most frequent size of forward values that later blocks read; of equally
        frequent ones the largest."""
        found = Counter(
            _numel(type_of(node)) for node, stage in self.stages.stage.items()
            if note(node).phase == "forward" and any(self.stages.stage.get(user, stage) > stage for user in node.users
                                                     if note(user).phase == "forward")
        )  # fmt: skip
        return max(found, key=lambda numel: (found[numel], numel), default=0)

    def _gradients(self) -> set[fx.Node]:
        """The operators that make gradients of parameters."""
        found: set[fx.Node] = set()
        frontier = [t for node in self.program.results_of("gradient").values() for t in terms(node)]
        while frontier:
            node = frontier.pop()
            found.add(node)
            if is_free(node) and node.op == "call_function":
                frontier += node.all_input_nodes[:1]
        return found

    def _add_parameters(self) -> None:
        trained = self.program.results_of("gradient").keys()
        for name, node in self.program.inputs("parameter").items():
            numel, owner = prod(tensor_type(node).shape), self.block_of(name)
            if owner:
                self.of_block[owner].add_parameter(name, numel, name in trained)
                continue
            read = {self.stages.stage[user] for user in _readers(node) if user in self.stages.stage}
            for stage in read or {0}:
                self.beside[self.blocks[stage]].add_parameter(name, numel, name in trained)

    def _add_values(self) -> None:
        """Adds what is kept for the backward, and what crosses the beginnings of blocks."""
        stage, largest = self.stages.stage, self.saved_bytes // 4
        for node, users in _storages(self.program):
            if node not in stage or note(node).phase != "forward" or node in self.views:
                continue
            num = sum(t.num_bytes for t in tensors_of(type_of(node)))
            if any(note(user).phase == "backward" for user in users):
                unit = self._unit(node, stage[node])
                if largest and num >= largest:
                    unit.logits_bytes += num
                else:
                    unit.kept_bytes += num
                    unit.kept_wide_bytes += num if _numel(type_of(node)) == self.wide else 0
            readers = {stage[user] for user in users if user in stage and note(user).phase == "forward"}
            for reader in readers - {stage[node]}:
                self.of_block[self.blocks[reader]].given_bytes += num
            for place in range(stage[node] + 1, max(readers, default=0) + 1):
                self.of_block[self.blocks[place]].crossing_bytes += num


def _is_beside(module: str, block: str, stage: int, stages: int) -> bool:
    """Whether a node goes beside the block of its stage: if it is of a module outside all blocks, or, in the last
    stage, of no module, like a loss. In other stages nodes of no module count to the block."""
    return not block and (bool(module) or stage == stages - 1)


def _divided(stages: int) -> Schedule:
    """A schedule of `stages` stages on one rank, with backwards in two parts."""
    forwards = [Action(stage, 0, "F") for stage in range(stages)]
    backwards = [Action(stage, 0, kind) for stage in reversed(range(stages)) for kind in ("I", "W")]
    return Schedule("alone", stages, 1, ((*forwards, *backwards),))


def _numel(type: object) -> int:
    return prod(type.shape) if isinstance(type, TensorType) else 0


def _views_of_parameters(program: Program) -> set[fx.Node]:
    views = set(program.inputs("parameter").values())
    for node in program.computes:
        if set(node.all_input_nodes) and set(node.all_input_nodes) <= views and is_free(node):
            views.add(node)
    return views


def _readers(parameter: fx.Node) -> Iterator[fx.Node]:
    frontier = [parameter]
    while frontier:
        for user in frontier.pop().users:
            if is_free(user):
                frontier.append(user)
            else:
                yield user


def _storages(program: Program) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
    """Every value that is not a view, with the readers of it and of its views."""
    root: dict[fx.Node, fx.Node] = {}
    users = defaultdict[fx.Node, set[fx.Node]](set)
    for node in program.computes:
        source = next(aliased_inputs(node), None)
        is_view = source is not None and is_free(node) and node.target is not operator.getitem
        root[node] = root.get(source, source) if is_view and source is not None else node
        for value in node.all_input_nodes:
            users[root.get(value, value)].add(node)
    tensors = (node for node in program.computes if isinstance(type_of(node), TensorType))
    return ((node, users[node]) for node in tensors if root[node] is node)
