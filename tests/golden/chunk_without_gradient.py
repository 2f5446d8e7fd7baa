"""`frozen` has no gradient and `idle` no reader: the chunk's gradients are those of its other slots.

`a` and `b` are added to the same value, so that one gradient serves two slots.
"""


def before(
    x: "f32[4, 4] | input:0",
    idle: "f32[4, 4] | parameter:idle",
    a: "f32[4, 4] | parameter:a",
    frozen: "f32[4, 4] | parameter:frozen",
    b: "f32[4, 4] | parameter:b",
):
    # forward
    h: "f32[4, 4]" = aten.mm.default(x, frozen)
    k: "f32[4, 4]" = aten.add.Tensor(h, a)
    y: "f32[4, 4]" = aten.add.Tensor(k, b)
    turn: "(f32[4, 4])" = yield [y], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    return {"gradient:a": tangent, "gradient:b": tangent}


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[256] | chunk=0" = geminifx.fetch(0, 256, torch.float32)
    wait: "f32[256] | chunk=0" = geminifx.wait(fetch, 0)
    frozen_1: "f32[4, 4] | chunk=0" = geminifx.view(wait, 128, [4, 4])
    h: "f32[4, 4]" = aten.mm.default(x, frozen_1)
    a_1: "f32[4, 4] | chunk=0" = geminifx.view(wait, 64, [4, 4])
    k: "f32[4, 4]" = aten.add.Tensor(h, a_1)
    b_1: "f32[4, 4] | chunk=0" = geminifx.view(wait, 192, [4, 4])
    y: "f32[4, 4]" = aten.add.Tensor(k, b_1)
    turn: "(f32[4, 4])" = yield [y], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    gradients: "f32[256] | chunk=0" = geminifx.gradients(256, torch.float32)
    geminifx.put(gradients, 192, tangent)
    geminifx.put(gradients, 64, tangent)
    geminifx.reduce(gradients, 0, [1, 3])
    geminifx.accumulate_grad(gradients, 0, [1, 3])
    return {}
