"""Which stage of a pipeline each operator belongs to.

An operator of a block belongs to the block's stage. Operators between blocks go with the block before them, embeddings
with the first stage, head and loss with the last. In the backward an operator belongs to its module's forward stage, or
else to the stage of the operator before it. Values that depend on no parameter, such as masks and positions, belong to
no stage: each rank makes those that it reads. If weights live on the hosts, where stages have no rank of their own, the
same is true of all values that depend on no example, because every rank has the weights it reads.
"""

from collections import defaultdict

from torch import fx

from ...runtime.isa.errors import ShardingError
from ...runtime.isa.instructions import SAVE_RNG, SWAP_RNG
from ..program.plan import Plan
from ..program.program import Program, aliased_inputs, is_random, note
from .parts import JOINS, block_finder, of_microbatches, terms


def swaps_of_draws(program: Program) -> dict[fx.Node, fx.Node]:
    """The instructions that swap the generator's state around a single random operator, mapped to that operator."""
    found: dict[fx.Node, fx.Node] = {}
    for node in program.computes:
        if is_random(node):
            for swap in (node.prev, node.next):
                if swap.target is SWAP_RNG:
                    found[swap] = node
    return found


def assigned(program: Program, plan: Plan) -> dict[fx.Node, int]:
    """The stage of each operator that depends on parameters or tangents, or draws."""
    assert plan.schedule is not None
    found: dict[fx.Node, int] = {}
    in_stages, bound = set[fx.Node](), set(program.inputs("tangent").values())
    views = set(program.inputs("parameter").values())
    everywhere = _of_no_example(program, plan) if plan.schedule.weights == "host" else set[fx.Node]()
    for node in program.computes:
        if node.target is SWAP_RNG or node in everywhere:
            continue
        sources = set(node.all_input_nodes)
        if not is_random(node) and node.target is not SAVE_RNG and not sources & (in_stages | bound | views):
            continue
        if sources <= views and sources == set(aliased_inputs(node)):
            views.add(node)
        else:
            in_stages.add(node)
    walk = _Walk(plan)
    for node in program.computes:
        if node in in_stages:
            found[node] = walk.forward(node, found) if note(node).phase == "forward" else walk.backward(node, found)
    return found


def _of_no_example(program: Program, plan: Plan) -> set[fx.Node]:
    """The nodes that every rank can compute from weights and from values known before the first action. Raises
    ShardingError if a gradient is among them, because every rank would add it."""
    own = of_microbatches(program)
    if plan.microbatches == 1:  # the batch itself
        read = set(program.inputs("input").values())
        for node in program.computes:
            if not read.isdisjoint(node.all_input_nodes):
                read.add(node)
        own |= read
    found = {node for node in program.computes if node.target is SAVE_RNG}
    found |= {node for node in program.computes if node not in own and node.target not in JOINS}
    for name, gradient in program.results_of("gradient").items():
        if not found.isdisjoint(terms(gradient)):
            raise ShardingError(
                f"the gradient of {name} does not depend on the batch, as with a penalty on weights, and in a "
                "round-robin schedule no rank owns that weight; use a schedule such as '1f1b'"
            )
    return found


class _Walk:
    """A walk through the operators in order that keeps track of the current stage."""

    def __init__(self, plan: Plan) -> None:
        self.block_of = block_finder(plan.blocks)
        self.stages = stages_of_blocks(plan.blocks, plan.stages)
        self.now, self.last = 0, len(plan.stages) - 1
        self.turned = False
        self.of_module = defaultdict[str, set[int]](set)

    def forward(self, node: fx.Node, found: dict[fx.Node, int]) -> int:
        """The stage of a forward operator: no earlier than those of its inputs."""
        if node.target in JOINS:
            return found[node.args[0]]
        module = note(node).module
        self.now = self.stages.get(self.block_of(module), self.now)
        stage = max([self.now, *(found[value] for value in node.all_input_nodes if value in found)])
        self.of_module[module].add(stage)
        return stage

    def backward(self, node: fx.Node, found: dict[fx.Node, int]) -> int:
        """The stage of a backward operator: no later than those of its inputs from the backward."""
        if not self.turned:
            self.now, self.turned = self.last, True
        module = note(node).module
        known = self.of_module[module] if module else set()
        self.now = self.stages.get(self.block_of(module), next(iter(known)) if len(known) == 1 else self.now)
        read = (value for value in node.all_input_nodes if note(value).phase == "backward")
        return min([self.now, *(found[value] for value in read if value in found)])


def stages_of_blocks(blocks: tuple[str, ...], begins: tuple[str, ...]) -> dict[str, int]:
    """The stage of each block. Raises ShardingError unless the stages begin with the model's beginning ("") and then
    with distinct blocks in the model's order, none of them the first."""
    order = {name: i for i, name in enumerate(blocks)}
    places = [order.get(name, -1) for name in begins[1:]]
    if begins[:1] != ("",) or -1 in places or places != sorted(set(places)) or 0 in places:
        raise ShardingError(
            f"the stages of a pipeline begin with {', '.join(map(repr, begins))}; expected '' (the beginning of the "
            f"model), then names of blocks in their order, except the first: {', '.join(blocks) or 'there are none'}"
        )
    return {name: sum(i >= place for place in places) for name, i in order.items()}
