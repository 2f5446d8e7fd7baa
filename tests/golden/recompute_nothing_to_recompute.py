"""The backward reads nothing of the block but its output: the program stays as it is."""


def before(
    x: "f32[4] | input:0",
    tangent: "f32[4] | tangent:0",
):
    # forward: layers.0
    a: "f32[4]" = aten.sin.default(x)
    out: "f32[4]" = aten.exp.default(a)
    # forward: layers.1
    y: "f32[4]" = aten.exp.default(out)
    # backward: layers.1
    dout: "f32[4]" = aten.mul.Tensor(tangent, y)
    # backward: layers.0
    dx: "f32[4]" = aten.mul.Tensor(dout, out)
    return {"output:0": y, "gradient:input:0": dx}


def after(
    x: "f32[4] | input:0",
    tangent: "f32[4] | tangent:0",
):
    # forward: layers.0
    a: "f32[4]" = aten.sin.default(x)
    out: "f32[4]" = aten.exp.default(a)
    # forward: layers.1
    y: "f32[4]" = aten.exp.default(out)
    # backward: layers.1
    dout: "f32[4]" = aten.mul.Tensor(tangent, y)
    # backward: layers.0
    dx: "f32[4]" = aten.mul.Tensor(dout, out)
    return {"output:0": y, "gradient:input:0": dx}
