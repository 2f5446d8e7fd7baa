"""What lies between two products is one function. A sum that a later product reads too is handed out, and a view of a
result is taken behind it.
"""


def before(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    # forward: fc
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    h: "f32[4, 4]" = aten.mm.default(x, w)
    # forward: norm
    a: "f32[4, 4]" = aten.add.Tensor(x, h)
    p: "f32[4, 4]" = aten.pow.Tensor_Scalar(a, 2)
    m: "f32[4, 1]" = aten.mean.dim(p, [-1], True)
    r: "f32[4, 1]" = aten.rsqrt.default(m)
    n: "f32[4, 4]" = aten.mul.Tensor(a, r)
    t: "f32[4, 4]{1, 4}" = aten.t.default(n)
    # forward: fc
    y: "f32[4, 4]" = aten.mm.default(t, w)
    geminifx.release(wait, 0)
    # forward
    z: "f32[4, 4]" = aten.mm.default(a, y)
    return {"output:0": z}


@geminifx.fused
def norm_forward(
    x: "f32[4, 4]",
    h: "f32[4, 4]",
):
    # forward
    a: "f32[4, 4]" = aten.add.Tensor(x, h)
    p: "f32[4, 4]" = aten.pow.Tensor_Scalar(a, 2)
    m: "f32[4, 1]" = aten.mean.dim(p, [-1], True)
    r: "f32[4, 1]" = aten.rsqrt.default(m)
    n: "f32[4, 4]" = aten.mul.Tensor(a, r)
    return [a, n]


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    # forward: fc
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    h: "f32[4, 4]" = aten.mm.default(x, w)
    # forward: norm
    results: "(f32[4, 4], f32[4, 4])" = norm_forward(x, h)
    a: "f32[4, 4]" = results[0]
    n: "f32[4, 4]" = results[1]
    t: "f32[4, 4]{1, 4}" = aten.t.default(n)
    # forward: fc
    y: "f32[4, 4]" = aten.mm.default(t, w)
    geminifx.release(wait, 0)
    # forward
    z: "f32[4, 4]" = aten.mm.default(a, y)
    return {"output:0": z}
