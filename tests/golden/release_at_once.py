"""Where no chunk instruction is near, a chunk is released right after its last reader."""


def before(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    a: "f32[4, 4]" = aten.mm.default(x, w)
    b: "f32[4, 4]" = aten.sin.default(a)
    c: "f32[4, 4]" = aten.cos.default(b)
    d: "f32[4, 4]" = aten.sin.default(c)
    e: "f32[4, 4]" = aten.cos.default(d)
    f: "f32[4, 4]" = aten.sin.default(e)
    g: "f32[4, 4]" = aten.cos.default(f)
    h: "f32[4, 4]" = aten.sin.default(g)
    i: "f32[4, 4]" = aten.cos.default(h)
    return {"output:0": i}


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    a: "f32[4, 4]" = aten.mm.default(x, w)
    geminifx.release(wait, 0)
    b: "f32[4, 4]" = aten.sin.default(a)
    c: "f32[4, 4]" = aten.cos.default(b)
    d: "f32[4, 4]" = aten.sin.default(c)
    e: "f32[4, 4]" = aten.cos.default(d)
    f: "f32[4, 4]" = aten.sin.default(e)
    g: "f32[4, 4]" = aten.cos.default(f)
    h: "f32[4, 4]" = aten.sin.default(g)
    i: "f32[4, 4]" = aten.cos.default(h)
    return {"output:0": i}
