"""A program without tangents has no turn and returns its outputs; it may still write buffers."""


def before(
    x: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:w",
    calls: "i64[] | buffer:calls",
):
    # forward
    t: "f32[4, 4]{1, 4}" = aten.t.default(w)
    y: "f32[4, 4]" = aten.mm.default(x, t)
    more: "i64[]" = aten.add.Tensor(calls, 1)
    unread: "f32[4, 4]" = aten.relu.default(y)
    return {"output:0": y, "mutation:calls": more}


def after(
    x: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:w",
    calls: "i64[] | buffer:calls",
):
    # forward
    t: "f32[4, 4]{1, 4}" = aten.t.default(w)
    y: "f32[4, 4]" = aten.mm.default(x, t)
    more: "i64[]" = aten.add.Tensor(calls, 1)
    copy_: "i64[]" = aten.copy_.default(calls, more)
    return {"output:0": y}
