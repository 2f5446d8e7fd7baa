"""A chunk's gradients are accumulated in front of the next chunk's reduce: they travel while the next are computed."""


def before(
    x: "f32[4, 4] | input:0",
):
    # forward
    y: "f32[4, 4]" = aten.sin.default(x)
    turn: "(f32[4, 4])" = yield [y], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    da: "f32[4, 4]" = aten.mm.default(x, tangent)
    gradients: "f32[64] | chunk=1" = geminifx.gradients(64, torch.float32)
    geminifx.put(gradients, 0, da)
    geminifx.reduce(gradients, 1, [0])
    geminifx.accumulate_grad(gradients, 1, [0])
    h: "f32[4, 4]" = aten.sin.default(da)
    db: "f32[4, 4]" = aten.mm.default(h, tangent)
    gradients_1: "f32[64] | chunk=0" = geminifx.gradients(64, torch.float32)
    geminifx.put(gradients_1, 0, db)
    geminifx.reduce(gradients_1, 0, [0])
    geminifx.accumulate_grad(gradients_1, 0, [0])
    return {}


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    y: "f32[4, 4]" = aten.sin.default(x)
    turn: "(f32[4, 4])" = yield [y], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    da: "f32[4, 4]" = aten.mm.default(x, tangent)
    gradients: "f32[64] | chunk=1" = geminifx.gradients(64, torch.float32)
    geminifx.put(gradients, 0, da)
    geminifx.reduce(gradients, 1, [0])
    h: "f32[4, 4]" = aten.sin.default(da)
    db: "f32[4, 4]" = aten.mm.default(h, tangent)
    gradients_1: "f32[64] | chunk=0" = geminifx.gradients(64, torch.float32)
    geminifx.put(gradients_1, 0, db)
    geminifx.accumulate_grad(gradients, 1, [0])
    geminifx.reduce(gradients_1, 0, [0])
    geminifx.accumulate_grad(gradients_1, 0, [0])
    return {}
