"""A chunk is read before it is let go, and what is written to before it is written; one operator alone stays, as does
what draws random numbers.
"""


def before(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    a: "f32[4, 4]" = aten.mul.Tensor(x, w)
    b: "f32[4, 4]" = aten.add.Tensor(a, w)
    geminifx.release(wait, 0)
    c: "f32[4, 4]" = aten.sin.default(b)
    d: "f32[4, 4]" = aten.cos.default(c)
    random: "f32[4, 4]" = aten.rand_like.default(x)
    e: "f32[4, 4]" = aten.exp.default(d)
    f: "f32[4, 4]" = aten.mul.Tensor(e, random)
    g: "f32[4, 4]" = aten.mm.default(f, f)
    total: "f32[4, 4]" = aten.add_.Tensor(g, f)
    h: "f32[4, 4]" = aten.sin.default(total)
    i: "f32[4, 4]" = aten.mm.default(h, h)
    return {"output:0": i}


@geminifx.fused
def shared_forward(
    x: "f32[4, 4]",
    w: "f32[4, 4]",
):
    # forward
    a: "f32[4, 4]" = aten.mul.Tensor(x, w)
    b: "f32[4, 4]" = aten.add.Tensor(a, w)
    return [b]


@geminifx.fused
def shared_forward_2(
    b: "f32[4, 4]",
    random: "f32[4, 4]",
):
    # forward
    c: "f32[4, 4]" = aten.sin.default(b)
    d: "f32[4, 4]" = aten.cos.default(c)
    e: "f32[4, 4]" = aten.exp.default(d)
    f: "f32[4, 4]" = aten.mul.Tensor(e, random)
    return [f]


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    results: "(f32[4, 4])" = shared_forward(x, w)
    b: "f32[4, 4]" = results[0]
    geminifx.release(wait, 0)
    random: "f32[4, 4]" = aten.rand_like.default(x)
    results_1: "(f32[4, 4])" = shared_forward_2(b, random)
    f: "f32[4, 4]" = results_1[0]
    g: "f32[4, 4]" = aten.mm.default(f, f)
    total: "f32[4, 4]" = aten.add_.Tensor(g, f)
    h: "f32[4, 4]" = aten.sin.default(total)
    i: "f32[4, 4]" = aten.mm.default(h, h)
    return {"output:0": i}
