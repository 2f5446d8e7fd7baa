"""Buffers are written back in front of the turn; a backward that reads the old value reads a copy of it."""


def before(
    x: "f32[4] | input:0",
    mean: "f32[4] | buffer:bn.mean",
    count: "i64[] | buffer:bn.count",
    scale: "f32[4] | buffer:bn.scale",
    tangent: "f32[4] | tangent:0",
):
    # forward: bn
    new_mean: "f32[4]" = aten.add.Tensor(mean, x)
    new_count: "i64[]" = aten.add.Tensor(count, 1)
    y: "f32[4]" = aten.mul.Tensor(x, scale)
    # backward: bn
    centred: "f32[4]" = aten.sub.Tensor(tangent, mean)
    dx: "f32[4]" = aten.mul.Tensor(centred, scale)
    return {"output:0": y, "mutation:bn.mean": new_mean, "mutation:bn.count": new_count, "gradient:input:0": dx}


def after(
    x: "f32[4] | input:0",
    mean: "f32[4] | buffer:bn.mean",
    count: "i64[] | buffer:bn.count",
    scale: "f32[4] | buffer:bn.scale",
):
    # forward: bn
    new_mean: "f32[4]" = aten.add.Tensor(mean, x)
    new_count: "i64[]" = aten.add.Tensor(count, 1)
    y: "f32[4]" = aten.mul.Tensor(x, scale)
    # forward
    clone: "f32[4]" = aten.clone.default(mean)
    copy_: "f32[4]" = aten.copy_.default(mean, new_mean)
    copy__1: "i64[]" = aten.copy_.default(count, new_count)
    turn: "(f32[4])" = yield [y], [0]
    # backward
    tangent_1: "f32[4]" = turn[0]
    # backward: bn
    centred: "f32[4]" = aten.sub.Tensor(tangent_1, clone)
    dx: "f32[4]" = aten.mul.Tensor(centred, scale)
    return {"gradient:input:0": dx}
