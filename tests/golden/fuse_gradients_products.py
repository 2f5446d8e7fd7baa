"""The first gradient is a product, and its buffer stands in front of it; that of a bias is a sum, reshaped or not."""


def before(
    x: "f32[8, 4] | input:0",
):
    # forward: fc
    h: "f32[8, 4]" = aten.sin.default(x)
    turn: "(f32[8, 4])" = yield [h], [0]
    # backward: fc
    tangent: "f32[8, 4]" = turn[0]
    t: "f32[4, 8]{1, 4}" = aten.t.default(tangent)
    dw: "f32[4, 4]" = aten.mm.default(t, x)
    gradients: "f32[256] | chunk=0" = geminifx.gradients(256, torch.float32)
    geminifx.put(gradients, 0, dw)
    db: "f32[4]" = aten.sum.dim_IntList(tangent, [0])
    geminifx.put(gradients, 64, db)
    kept: "f32[1, 4]" = aten.sum.dim_IntList(tangent, [-2], True)
    db2: "f32[4]" = aten.view.default(kept, [4])
    geminifx.put(gradients, 192, db2)
    dv: "f32[4, 4]" = aten.mm.default(t, h)
    geminifx.put(gradients, 128, dv)
    geminifx.reduce(gradients, 0, [0, 1, 2, 3])
    geminifx.accumulate_grad(gradients, 0, [0, 1, 2, 3])
    return {}


def after(
    x: "f32[8, 4] | input:0",
):
    # forward: fc
    h: "f32[8, 4]" = aten.sin.default(x)
    turn: "(f32[8, 4])" = yield [h], [0]
    # backward: fc
    tangent: "f32[8, 4]" = turn[0]
    t: "f32[4, 8]{1, 4}" = aten.t.default(tangent)
    gradients: "f32[256] | chunk=0" = geminifx.gradients(256, torch.float32)
    geminifx.put_mm(gradients, 0, t, x)
    geminifx.put_sum(gradients, 64, tangent, [0])
    geminifx.put_sum(gradients, 192, tangent, [0])
    geminifx.put_mm(gradients, 128, t, h)
    geminifx.reduce(gradients, 0, [0, 1, 2, 3])
    geminifx.accumulate_grad(gradients, 0, [0, 1, 2, 3])
    return {}
