"""What the backward reads of a buffer through views, and what other writes take from it, is the old value."""


def before(
    x: "f32[4] | input:0",
    cur: "f32[4, 4] | buffer:cur",
    prev: "f32[4, 4] | buffer:prev",
    tangent: "f32[4] | tangent:0",
):
    # forward: queue
    t: "f32[4, 4]{1, 4}" = aten.t.default(cur)
    row: "f32[4]{4}" = aten.select.int(t, 0, 0)
    y: "f32[4]" = aten.mul.Tensor(x, row)
    new: "f32[4, 4]" = aten.add.Tensor(cur, y)
    # backward: queue
    dx: "f32[4]" = aten.mul.Tensor(tangent, row)
    return {"output:0": y, "mutation:cur": new, "mutation:prev": cur, "gradient:input:0": dx}


def after(
    x: "f32[4] | input:0",
    cur: "f32[4, 4] | buffer:cur",
    prev: "f32[4, 4] | buffer:prev",
):
    # forward: queue
    t: "f32[4, 4]{1, 4}" = aten.t.default(cur)
    row: "f32[4]{4}" = aten.select.int(t, 0, 0)
    y: "f32[4]" = aten.mul.Tensor(x, row)
    new: "f32[4, 4]" = aten.add.Tensor(cur, y)
    # forward
    clone: "f32[4, 4]" = aten.clone.default(cur)
    # forward: queue
    t_1: "f32[4, 4]{1, 4}" = aten.t.default(clone)
    row_1: "f32[4]{4}" = aten.select.int(t_1, 0, 0)
    # forward
    copy_: "f32[4, 4]" = aten.copy_.default(cur, new)
    copy__1: "f32[4, 4]" = aten.copy_.default(prev, clone)
    turn: "(f32[4])" = yield [y], [0]
    # backward
    tangent_1: "f32[4]" = turn[0]
    # backward: queue
    dx: "f32[4]" = aten.mul.Tensor(tangent_1, row_1)
    return {"gradient:input:0": dx}
