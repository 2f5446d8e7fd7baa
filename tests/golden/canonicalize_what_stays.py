"""What looks repeated and is not: forward and backward, random draws, 0.0 and -0.0, writes."""


def before(
    x: "f32[4] | input:0",
    b: "f32[4] | buffer:b",
    tangent: "f32[5, 4] | tangent:0",
):
    # forward
    r1: "f32[4]" = aten.bernoulli.p(x, 0.5)
    r2: "f32[4]" = aten.bernoulli.p(x, 0.5)
    zero: "f32[4]" = aten.full_like.default(x, 0.0)
    minus: "f32[4]" = aten.full_like.default(x, -0.0)
    s: "f32[4]" = aten.exp.default(x)
    y: "f32[5, 4]" = aten.stack.default([r1, r2, zero, minus, s])
    copy_: "f32[4]" = aten.copy_.default(b, s)
    copy__1: "f32[4]" = aten.copy_.default(b, s)
    # backward
    s_1: "f32[4]" = aten.exp.default(x)
    ds: "f32[4]" = aten.select.int(tangent, 0, 4)
    dx: "f32[4]" = aten.mul.Tensor(ds, s_1)
    return {"output:0": y, "gradient:input:0": dx}


def after(
    x: "f32[4] | input:0",
    b: "f32[4] | buffer:b",
    tangent: "f32[5, 4] | tangent:0",
):
    # forward
    r1: "f32[4]" = aten.bernoulli.p(x, 0.5)
    r2: "f32[4]" = aten.bernoulli.p(x, 0.5)
    zero: "f32[4]" = aten.full_like.default(x, 0.0)
    minus: "f32[4]" = aten.full_like.default(x, -0.0)
    s: "f32[4]" = aten.exp.default(x)
    y: "f32[5, 4]" = aten.stack.default([r1, r2, zero, minus, s])
    copy_: "f32[4]" = aten.copy_.default(b, s)
    copy__1: "f32[4]" = aten.copy_.default(b, s)
    # backward
    s_1: "f32[4]" = aten.exp.default(x)
    ds: "f32[4]" = aten.select.int(tangent, 0, 4)
    dx: "f32[4]" = aten.mul.Tensor(ds, s_1)
    return {"output:0": y, "gradient:input:0": dx}
