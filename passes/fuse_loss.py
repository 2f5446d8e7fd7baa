"""Compute the projection onto the vocabulary and its cross-entropy in pieces, without whole logits.

    before                                                    after
    t = aten.t.default(w)
    logits = aten.mm.default(h, t)                            absent = geminifx.absent(loss)
    p = aten._log_softmax.default(logits, 1, False)           both = geminifx.linear_cross_entropy(h, w, ...)
    nll = aten.nll_loss_forward.default(p, labels, ...)
    loss, weight = nll[0], nll[1]                             loss, weight = both[0], both[1]
    # backward                                                # backward
    dp = aten.nll_loss_backward.default(g, p, labels, ...)    all = geminifx.linear_cross_entropy_backward(...)
    d = aten._log_softmax_backward_data.default(dp, p, ...)
    dh = aten.mm.default(d, w)                                dh = all[0]
    dw = aten.mm.default(aten.t.default(d), h)                dw = all[1]
    return {"output:0": loss, "output:1": logits, ...}        return {"output:0": loss, "output:1": absent, ...}

Views, casts, a constant scale and a softcap may stand between product and loss. A loss stays as it is if anything else
computes with its logits, or if it has no more classes than the hidden states have features, because its logits are
small then. The plan decides whether the pass acts at all.
"""

import operator

import torch
from torch import fx

from ..runtime.isa.linear_cross_entropy import ABSENT, BACKWARD, FORWARD, token_chunk, vocabulary_chunk
from .patterns.cross_entropy import Loss, find_losses
from .program.manager import graph_pass
from .program.plan import Plan
from .program.program import Program, note, tensor_type
from .program.verify import canonical

TO_COPY = torch.ops.aten._to_copy.default


@graph_pass(requires=(canonical,))
def fuse_loss(program: Program, plan: Plan) -> None:
    if not plan.fuse_loss:
        return
    for loss in list(find_losses(program)):
        _rewrite(program, loss)
    program.eliminate_dead_code()


def _rewrite(program: Program, loss: Loss) -> None:
    labels, _, reduction, ignored = loss.nll.args[1:]
    arguments = (*loss.operands, labels)
    options = (loss.scale, loss.softcap, ignored, reduction)
    sizes = tensor_type(loss.product).shape
    forward = program.emit(FORWARD, (*arguments, *options, token_chunk(*sizes)), before=loss.nll,
                           like=note(loss.product))  # fmt: skip
    value, weight, normalizer = _elements(program, forward, "loss", "total_weight", "normalizer")
    wanted = [place in loss.gradients for place in range(3)]
    computed = (loss.nll_backward.args[0], *arguments, weight, normalizer, *options, vocabulary_chunk(*sizes), wanted)
    origin = note(next(iter(loss.gradients.values())))
    backward = program.emit(BACKWARD, computed, before=loss.nll_backward, like=origin)
    gradients = _elements(program, backward, "d_hidden", "d_weight", "d_bias")
    for place, node in loss.gradients.items():
        program.replace(node, gradients[place])
    for element in list(loss.nll.users):
        program.replace(element, _as(program, (value, weight)[element.args[1]], element))
    _leave_out(program, loss, value)


def _elements(program: Program, results: fx.Node, *names: str) -> list[fx.Node]:
    behind, origin = results.next, note(results)
    return [
        program.emit(operator.getitem, (results, place), before=behind, like=origin, name=name)
        for place, name in enumerate(names)
    ]


def _as(program: Program, value: fx.Node, like: fx.Node) -> fx.Node:
    """`value` cast to the dtype of `like`: a low-precision loss is computed in float32 and rounded once."""
    dtype = tensor_type(like).dtype
    if tensor_type(value).dtype == dtype:
        return value
    return program.emit(TO_COPY, (value,), {"dtype": dtype}, before=like)


def _leave_out(program: Program, loss: Loss, value: fx.Node) -> None:
    """Replace outputs that were logits by `absent`, so that outputs keep their positions."""
    returned = [role for role, node in program.results.items() if node in loss.logits]
    if returned:
        absent = program.emit(ABSENT, (value,), before=loss.nll, like=note(loss.product))
        program.set_results({**program.results, **dict.fromkeys(returned, absent)})
