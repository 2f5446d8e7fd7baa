"""Each phase fetches a chunk once, in front of its first reader; gradients go in as they come and leave together."""


def before(
    x: "f32[4, 4] | input:0",
    a: "f32[4, 4] | parameter:fc.a",
    b: "f32[4, 4] | parameter:fc.b",
):
    # forward: fc
    h: "f32[4, 4]" = aten.mm.default(x, a)
    k: "f32[4, 4]" = aten.mm.default(h, b)
    y: "f32[4, 4]" = aten.mm.default(k, a)
    turn: "(f32[4, 4])" = yield [y], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    # backward: fc
    db: "f32[4, 4]" = aten.mm.default(tangent, a)
    dh: "f32[4, 4]" = aten.mm.default(db, b)
    da: "f32[4, 4]" = aten.mm.default(dh, h)
    return {"gradient:fc.a": da, "gradient:fc.b": db, "gradient:input:0": dh}


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[128] | chunk=0" = geminifx.fetch(0, 128, torch.float32)
    wait: "f32[128] | chunk=0" = geminifx.wait(fetch, 0)
    # forward: fc
    fc_a: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    h: "f32[4, 4]" = aten.mm.default(x, fc_a)
    fc_b: "f32[4, 4] | chunk=0" = geminifx.view(wait, 64, [4, 4])
    k: "f32[4, 4]" = aten.mm.default(h, fc_b)
    y: "f32[4, 4]" = aten.mm.default(k, fc_a)
    turn: "(f32[4, 4])" = yield [y], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    fetch_1: "f32[128] | chunk=0" = geminifx.fetch(0, 128, torch.float32)
    wait_1: "f32[128] | chunk=0" = geminifx.wait(fetch_1, 0)
    # backward: fc
    fc_a_1: "f32[4, 4] | chunk=0" = geminifx.view(wait_1, 0, [4, 4])
    db: "f32[4, 4]" = aten.mm.default(tangent, fc_a_1)
    gradients: "f32[128] | chunk=0" = geminifx.gradients(128, torch.float32)
    geminifx.put(gradients, 64, db)
    fc_b_1: "f32[4, 4] | chunk=0" = geminifx.view(wait_1, 64, [4, 4])
    dh: "f32[4, 4]" = aten.mm.default(db, fc_b_1)
    da: "f32[4, 4]" = aten.mm.default(dh, h)
    geminifx.put(gradients, 0, da)
    geminifx.reduce(gradients, 0, [0, 1])
    geminifx.accumulate_grad(gradients, 0, [0, 1])
    return {"gradient:input:0": dh}
