"""Two layers compute the same with other weights: one function, called twice, its chunk an argument.

What stands alone or is too short for a call stays in the program.
"""


def before(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    fetch_1: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    # forward: layers.0.fc
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    t: "f32[4, 4]{1, 4}" = aten.t.default(w)
    a: "f32[4, 4]" = aten.mm.default(x, t)
    # forward: layers.0.act
    b: "f32[4, 4]" = aten.relu.default(a)
    geminifx.release(wait, 0)
    wait_1: "f32[64] | chunk=1" = geminifx.wait(fetch_1, 1)
    # forward: layers.1.fc
    w_1: "f32[4, 4] | chunk=1" = geminifx.view(wait_1, 0, [4, 4])
    t_1: "f32[4, 4]{1, 4}" = aten.t.default(w_1)
    c: "f32[4, 4]" = aten.mm.default(b, t_1)
    # forward: layers.1.act
    d: "f32[4, 4]" = aten.relu.default(c)
    geminifx.release(wait_1, 1)
    # forward: head
    y: "f32[]" = aten.sum.default(d)
    return {"output:0": y}


def layers_forward(
    wait: "f32[64]",
    x: "f32[4, 4]",
):
    # forward: fc
    w: "f32[4, 4]" = geminifx.view(wait, 0, [4, 4])
    t: "f32[4, 4]{1, 4}" = aten.t.default(w)
    a: "f32[4, 4]" = aten.mm.default(x, t)
    # forward: act
    b: "f32[4, 4]" = aten.relu.default(a)
    return [b]


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    fetch_1: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    # forward: layers.0
    box = [wait, x]
    results: "(f32[4, 4])" = layers_forward(box)
    b: "f32[4, 4]" = results[0]
    geminifx.release(wait, 0)
    wait_1: "f32[64] | chunk=1" = geminifx.wait(fetch_1, 1)
    # forward: layers.1
    box = [wait_1, b]
    results_1: "(f32[4, 4])" = layers_forward(box)
    d: "f32[4, 4]" = results_1[0]
    geminifx.release(wait_1, 1)
    # forward: head
    y: "f32[]" = aten.sum.default(d)
    return {"output:0": y}
