"""A block's inside is computed again in front of its backward; what other blocks read of it is kept."""


def before(
    x: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:layers.0.w",
    tangent: "f32[4, 4] | tangent:0",
):
    # forward: layers.0
    h: "f32[4, 4]" = aten.mm.default(x, w)
    r: "f32[4, 4]" = aten.relu.default(h)
    out: "f32[4, 4]" = aten.sin.default(r)
    # forward: layers.1
    y: "f32[4, 4]" = aten.exp.default(out)
    # backward: layers.1
    dout: "f32[4, 4]" = aten.mul.Tensor(tangent, y)
    # backward: layers.0
    cos: "f32[4, 4]" = aten.cos.default(r)
    dr: "f32[4, 4]" = aten.mul.Tensor(dout, cos)
    o: "f32[4, 4]" = aten.mul.Tensor(dr, out)
    return {"output:0": y, "gradient:input:0": o}


def after(
    x: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:layers.0.w",
    tangent: "f32[4, 4] | tangent:0",
):
    # forward: layers.0
    h: "f32[4, 4]" = aten.mm.default(x, w)
    r: "f32[4, 4]" = aten.relu.default(h)
    out: "f32[4, 4]" = aten.sin.default(r)
    # forward: layers.1
    y: "f32[4, 4]" = aten.exp.default(out)
    # backward: layers.1
    dout: "f32[4, 4]" = aten.mul.Tensor(tangent, y)
    # recompute: layers.0
    h_1: "f32[4, 4]" = aten.mm.default(x, w)
    r_1: "f32[4, 4]" = aten.relu.default(h_1)
    # backward: layers.0
    cos: "f32[4, 4]" = aten.cos.default(r_1)
    dr: "f32[4, 4]" = aten.mul.Tensor(dout, cos)
    o: "f32[4, 4]" = aten.mul.Tensor(dr, out)
    return {"output:0": y, "gradient:input:0": o}
