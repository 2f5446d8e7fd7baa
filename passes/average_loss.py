"""Make the loss the mean over all tokens, however many of them each rank or microbatch has.

    before                                                  after (two ranks)
    nll = aten.nll_loss_forward.default(p, labels, ...)     nll = aten.nll_loss_forward.default(p, labels, ...)
    loss, count = nll[0], nll[1]                            loss, count = nll[0], nll[1]
                                                            average = geminifx.average(count)
                                                            share = geminifx.share(loss, count, average)
                                                            mean = geminifx.average(share)
    # backward                                              # backward
    dp = aten.nll_loss_backward.default(g, p, ..., count)   dp = aten.nll_loss_backward.default(g, p, ..., average)
    return {"output:0": loss, ...}                          return {"output:0": mean, ...}

A rank's mean loss is weighted by its token count over the average count per rank. The mean of these shares over the
ranks is then the mean over all tokens, and averaging gradients over the ranks yields its gradients. A quotient beside
it whose divisor comes from the same labels, as where labels are smoothed, is weighted likewise. Every scalar output of
the model is averaged, so that all ranks see the same loss.

Microbatches are averaged like ranks, by `split_batch`. Token counts are averaged per rank and not per microbatch,
because ranks may run different numbers of microbatches. In a pipeline and in rounds, where backwards begin before all
forwards are done, tokens are counted from the labels, which are known from the start.
"""

import operator

import torch
from torch import fx

from ..runtime.isa.errors import ShardingError, SplitError
from ..runtime.isa.instructions import AVERAGE, SHARE, WAIT
from ..runtime.isa.linear_cross_entropy import BACKWARD, FORWARD, MEAN
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, note, tensor_type, type_of
from .program.types import TensorType
from .program.verify import canonical

aten = torch.ops.aten
MUL, DIV = aten.mul.Tensor, aten.div.Tensor

REDUCTION = {aten.nll_loss_forward.default: 3, aten.nll_loss2d_forward.default: 3, FORWARD: 7}
"""Operators that take a mean over tokens, with the position of `reduction` among their arguments."""

COUNT = {aten.nll_loss_backward.default: 6, aten.nll_loss2d_backward.default: 6, BACKWARD: 5}
"""Their backwards, with the position of the token count among their arguments."""

LABELS = {aten.nll_loss_forward.default: (1, 4), aten.nll_loss2d_forward.default: (1, 4), FORWARD: (3, 6)}
"""The positions of the labels and of the ignored label (`ignore_index`) among their arguments."""

CLASS_WEIGHTS = {aten.nll_loss_forward.default: 2, aten.nll_loss2d_forward.default: 2}


@graph_pass(requires=(canonical,))
def average_loss(program: Program, plan: Plan) -> None:
    if plan.batches == plan.microbatches == 1:
        return
    means = [node for node in program.computes
             if node.target in REDUCTION and node.args[REDUCTION[node.target]] == MEAN]  # fmt: skip
    for quotient in _quotients(program, {node.args[LABELS[node.target][0]] for node in means}):
        _weigh_quotient(program, quotient)
    for node in means:
        _weigh(program, node, plan)
    results = dict(program.results)
    for role, value in program.results_of("output").items():
        if _is_scalar(value):
            mean = program.emit(AVERAGE, (value,), before=value.next, like=note(value), name="mean")
            results[f"output:{role}"] = mean
    program.set_results(results)


def _weigh(program: Program, losses: fx.Node, plan: Plan) -> None:
    """Replace a mean loss by its share of the mean over all tokens, and its token count in the backward by the
    average."""
    loss, count = (_element(program, losses, i) for i in range(2))
    behind = max(loss, count, key=program.positions().__getitem__).next
    ahead = plan.schedule is not None or plan.rounds > 1
    counted = _labels_counted(program, losses, count, plan) if ahead else count
    mean_count = _mean_count(program, counted, plan.microbatches, behind)
    _share(program, loss, counted, mean_count, behind)
    for user in list(count.users):
        place = COUNT.get(user.target)
        if place is not None and user.args[place] is count:
            user.update_arg(place, mean_count)


def _quotients(program: Program, labels: set[object]) -> list[fx.Node]:
    """Further means over the same tokens, such as the half of a cross entropy that smooths its labels: divisions of a
    scalar by one that is computed from labels and constants alone."""
    found = []
    for node in program.computes:
        if node.target is DIV and note(node).phase == "forward" and _is_scalar(node):
            divisor, sources = node.args[1], set[fx.Node]()
            due = [divisor] if isinstance(divisor, fx.Node) else []
            while due:
                source = due.pop()
                due += [value for value in source.all_input_nodes if value not in sources]
                sources.add(source)
            if sources & labels and not any(source.target is WAIT for source in sources):
                found.append(node)
    return found


def _weigh_quotient(program: Program, quotient: fx.Node) -> None:
    """Replace a rank's mean by its share, as `_weigh` does; microbatches have none of these."""
    count, behind = quotient.args[1], quotient.next
    as_float = program.emit(aten._to_copy.default, (count,), {"dtype": tensor_type(quotient).dtype}, before=behind,
                            like=note(quotient), name="count")  # fmt: skip
    mean_count = _mean_count(program, as_float, 1, behind)
    _share(program, quotient, as_float, mean_count, behind)
    for user in list(count.users):
        if user.target is DIV and user.args[1] is count and note(user).phase == "backward":
            user.update_arg(1, mean_count)


def _share(program: Program, mean: fx.Node, count: fx.Node, mean_count: fx.Node, behind: fx.Node) -> None:
    """Everything that reads a rank's mean reads its share instead."""
    share = program.emit(SHARE, (mean, count, mean_count), before=behind, like=note(mean))
    for user in list(mean.users):
        if user is not share:
            user.replace_input_with(mean, share)


def _labels_counted(program: Program, losses: fx.Node, count: fx.Node, plan: Plan) -> fx.Node:
    """The number of labels that count, in the dtype of `count`. Raises SplitError (in rounds) or ShardingError (in a
    pipeline) if the loss has class weights."""
    weights = CLASS_WEIGHTS.get(losses.target)
    if weights is not None and losses.args[weights] is not None:
        error, what = (SplitError, "a step in rounds") if plan.schedule is None else (ShardingError, "a pipeline")
        raise error(
            f"{what} averages its loss over tokens, and this loss has class weights, which are not supported; leave "
            "weight= out of the loss"
        )
    labels, ignored = (losses.args[place] for place in LABELS[losses.target])
    origin, dtype = note(losses), tensor_type(count).dtype
    counts = program.emit(aten.ne.Scalar, (labels, ignored), before=losses, like=origin)
    number = program.emit(aten.sum.default, (counts,), before=losses, like=origin)
    return program.emit(aten._to_copy.default, (number,), {"dtype": dtype}, before=losses, like=origin, name="count")


def _mean_count(program: Program, count: fx.Node, microbatches: int, behind: fx.Node) -> fx.Node:
    """The average number of tokens per rank, divided by this rank's number of microbatches."""
    if microbatches == 1:
        return program.emit(AVERAGE, (count,), before=behind, like=note(count))
    of_all = program.emit(MUL, (count, microbatches), before=behind, like=note(count))
    mean = program.emit(AVERAGE, (of_all,), before=behind, like=note(count))
    return program.emit(DIV, (mean, microbatches), before=behind, like=note(count))


def _element(program: Program, results: fx.Node, place: int) -> fx.Node:
    for user in results.users:
        if user.target is operator.getitem and user.args[1] == place:
            return user
    name = ("loss", "count")[place]
    return program.emit(operator.getitem, (results, place), before=results.next, like=note(results), name=name)


def _is_scalar(value: fx.Node) -> bool:
    type = type_of(value)
    return isinstance(type, TensorType) and type.shape == () and tensor_type(value).dtype.is_floating_point
