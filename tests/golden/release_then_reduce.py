"""The gradient is complete before the weight's last reader: reduce and accumulate_grad move behind the release."""


def before(
    x: "f32[4, 4] | input:0",
):
    # forward
    h: "f32[4, 4]" = aten.sin.default(x)
    turn: "(f32[4, 4])" = yield [h], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    dw: "f32[4, 4]" = aten.mm.default(x, tangent)
    gradients: "f32[64] | chunk=0" = geminifx.gradients(64, torch.float32)
    geminifx.put(gradients, 0, dw)
    geminifx.reduce(gradients, 0, [0])
    geminifx.accumulate_grad(gradients, 0, [0])
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    dx: "f32[4, 4]" = aten.mm.default(tangent, w)
    out: "f32[4, 4]" = aten.mul.Tensor(dx, dx)
    return {"gradient:input:0": out}


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    h: "f32[4, 4]" = aten.sin.default(x)
    turn: "(f32[4, 4])" = yield [h], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    dw: "f32[4, 4]" = aten.mm.default(x, tangent)
    gradients: "f32[64] | chunk=0" = geminifx.gradients(64, torch.float32)
    geminifx.put(gradients, 0, dw)
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    dx: "f32[4, 4]" = aten.mm.default(tangent, w)
    out: "f32[4, 4]" = aten.mul.Tensor(dx, dx)
    geminifx.release(wait, 0)
    geminifx.reduce(gradients, 0, [0])
    geminifx.accumulate_grad(gradients, 0, [0])
    return {"gradient:input:0": out}
