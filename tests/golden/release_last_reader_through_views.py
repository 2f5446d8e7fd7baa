"""A chunk is read through views of views; `heads` and its parts still share its memory, `relu` does not.

The end of the program is near, so that the release waits for it and leaves the compute in one piece.
"""


def before(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    # forward: attn
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    t: "f32[4, 4]{1, 4}" = aten.t.default(w)
    heads: "(f32[4, 2]{1, 4}, f32[4, 2]{1, 4})" = aten.split.Tensor(t, 2, 1)
    q: "f32[4, 2]{1, 4}" = heads[0]
    k: "f32[4, 2]{1, 4}" = heads[1]
    a: "f32[4, 2]" = aten.mm.default(x, q)
    b: "f32[4, 2]" = aten.mm.default(x, k)
    c: "f32[4, 2]" = aten.add.Tensor(a, b)
    y: "f32[4, 2]" = aten.relu.default(c)
    return {"output:0": y}


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    # forward: attn
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    t: "f32[4, 4]{1, 4}" = aten.t.default(w)
    heads: "(f32[4, 2]{1, 4}, f32[4, 2]{1, 4})" = aten.split.Tensor(t, 2, 1)
    q: "f32[4, 2]{1, 4}" = heads[0]
    k: "f32[4, 2]{1, 4}" = heads[1]
    a: "f32[4, 2]" = aten.mm.default(x, q)
    b: "f32[4, 2]" = aten.mm.default(x, k)
    c: "f32[4, 2]" = aten.add.Tensor(a, b)
    y: "f32[4, 2]" = aten.relu.default(c)
    geminifx.release(wait, 0)
    return {"output:0": y}
