"""Two chunks: `a` is fetched for the forward alone, `b` for both; the gradients of `b` are complete first."""


def before(
    x: "f32[4, 4] | input:0",
    a: "f32[4, 4] | parameter:a",
    b: "f32[4, 4] | parameter:b",
):
    # forward
    h: "f32[4, 4]" = aten.mm.default(x, a)
    y: "f32[4, 4]" = aten.mm.default(h, b)
    turn: "(f32[4, 4])" = yield [y], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    db: "f32[4, 4]" = aten.mm.default(h, tangent)
    dh: "f32[4, 4]" = aten.mm.default(tangent, b)
    da: "f32[4, 4]" = aten.mm.default(x, dh)
    return {"gradient:a": da, "gradient:b": db}


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    a_1: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    h: "f32[4, 4]" = aten.mm.default(x, a_1)
    fetch_1: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    wait_1: "f32[64] | chunk=1" = geminifx.wait(fetch_1, 1)
    b_1: "f32[4, 4] | chunk=1" = geminifx.view(wait_1, 0, [4, 4])
    y: "f32[4, 4]" = aten.mm.default(h, b_1)
    turn: "(f32[4, 4])" = yield [y], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    db: "f32[4, 4]" = aten.mm.default(h, tangent)
    gradients_1: "f32[64] | chunk=1" = geminifx.gradients(64, torch.float32)
    geminifx.put(gradients_1, 0, db)
    geminifx.reduce(gradients_1, 1, [0])
    geminifx.accumulate_grad(gradients_1, 1, [0])
    fetch_2: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    wait_2: "f32[64] | chunk=1" = geminifx.wait(fetch_2, 1)
    b_2: "f32[4, 4] | chunk=1" = geminifx.view(wait_2, 0, [4, 4])
    dh: "f32[4, 4]" = aten.mm.default(tangent, b_2)
    da: "f32[4, 4]" = aten.mm.default(x, dh)
    gradients: "f32[64] | chunk=0" = geminifx.gradients(64, torch.float32)
    geminifx.put(gradients, 0, da)
    geminifx.reduce(gradients, 0, [0])
    geminifx.accumulate_grad(gradients, 0, [0])
    return {}
