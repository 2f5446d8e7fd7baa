"""The reduce is near, but a buffer for gradients would be made before it: the chunk is released in front of that."""


def before(
    x: "f32[4, 4] | input:0",
):
    # forward
    a: "f32[4, 4]" = aten.sin.default(x)
    turn: "(f32[4, 4])" = yield [a], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    dx: "f32[4, 4]" = aten.mm.default(tangent, w)
    gradients: "f32[64] | chunk=0" = geminifx.gradients(64, torch.float32)
    dw: "f32[4, 4]" = aten.mm.default(x, tangent)
    geminifx.put(gradients, 0, dw)
    geminifx.reduce(gradients, 0, [0])
    geminifx.accumulate_grad(gradients, 0, [0])
    return {"gradient:input:0": dx}


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    a: "f32[4, 4]" = aten.sin.default(x)
    turn: "(f32[4, 4])" = yield [a], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    dx: "f32[4, 4]" = aten.mm.default(tangent, w)
    geminifx.release(wait, 0)
    gradients: "f32[64] | chunk=0" = geminifx.gradients(64, torch.float32)
    dw: "f32[4, 4]" = aten.mm.default(x, tangent)
    geminifx.put(gradients, 0, dw)
    geminifx.reduce(gradients, 0, [0])
    geminifx.accumulate_grad(gradients, 0, [0])
    return {"gradient:input:0": dx}
