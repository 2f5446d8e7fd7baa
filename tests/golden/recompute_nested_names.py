"""layers.1.attn belongs to layers.1; layers.10 does not."""


def before(
    x: "f32[4] | input:0",
    tangent: "f32[4] | tangent:0",
):
    # forward: layers.1
    a: "f32[4]" = aten.sin.default(x)
    # forward: layers.1.attn
    b: "f32[4]" = aten.exp.default(a)
    # forward: layers.1
    c: "f32[4]" = aten.add.Tensor(b, x)
    # forward: layers.10
    d: "f32[4]" = aten.exp.default(c)
    y: "f32[4]" = aten.sin.default(d)
    # backward: layers.10
    cos: "f32[4]" = aten.cos.default(d)
    dc: "f32[4]" = aten.mul.Tensor(tangent, cos)
    # backward: layers.1
    dx: "f32[4]" = aten.mul.Tensor(dc, b)
    return {"output:0": y, "gradient:input:0": dx}


def after(
    x: "f32[4] | input:0",
    tangent: "f32[4] | tangent:0",
):
    # forward: layers.1
    a: "f32[4]" = aten.sin.default(x)
    # forward: layers.1.attn
    b: "f32[4]" = aten.exp.default(a)
    # forward: layers.1
    c: "f32[4]" = aten.add.Tensor(b, x)
    # forward: layers.10
    d: "f32[4]" = aten.exp.default(c)
    y: "f32[4]" = aten.sin.default(d)
    # backward: layers.10
    cos: "f32[4]" = aten.cos.default(d)
    dc: "f32[4]" = aten.mul.Tensor(tangent, cos)
    # recompute: layers.1
    a_1: "f32[4]" = aten.sin.default(x)
    # recompute: layers.1.attn
    b_1: "f32[4]" = aten.exp.default(a_1)
    # backward: layers.1
    dx: "f32[4]" = aten.mul.Tensor(dc, b_1)
    return {"output:0": y, "gradient:input:0": dx}
