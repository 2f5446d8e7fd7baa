"""Segments differ by an argument (0.0 and 0), or by what is read of them: each stays as it is."""


def before(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    # forward: layers.0
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    a: "f32[4, 4]" = aten.mm.default(x, w)
    b: "f32[4, 4]" = aten.clamp.default(a, 0.0, 1.0)
    c: "f32[4, 4]" = aten.sin.default(b)
    geminifx.release(wait, 0)
    fetch_1: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    wait_1: "f32[64] | chunk=1" = geminifx.wait(fetch_1, 1)
    # forward: layers.1
    w_1: "f32[4, 4] | chunk=1" = geminifx.view(wait_1, 0, [4, 4])
    d: "f32[4, 4]" = aten.mm.default(c, w_1)
    e: "f32[4, 4]" = aten.clamp.default(d, 0, 1)
    f: "f32[4, 4]" = aten.sin.default(e)
    geminifx.release(wait_1, 1)
    fetch_2: "f32[64] | chunk=2" = geminifx.fetch(2, 64, torch.float32)
    wait_2: "f32[64] | chunk=2" = geminifx.wait(fetch_2, 2)
    # forward: layers.2
    w_2: "f32[4, 4] | chunk=2" = geminifx.view(wait_2, 0, [4, 4])
    g: "f32[4, 4]" = aten.mm.default(f, w_2)
    h: "f32[4, 4]" = aten.clamp.default(g, 0, 1)
    i: "f32[4, 4]" = aten.sin.default(h)
    geminifx.release(wait_2, 2)
    return {"output:0": i, "output:1": g}


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    # forward: layers.0
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    a: "f32[4, 4]" = aten.mm.default(x, w)
    b: "f32[4, 4]" = aten.clamp.default(a, 0.0, 1.0)
    c: "f32[4, 4]" = aten.sin.default(b)
    geminifx.release(wait, 0)
    fetch_1: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    wait_1: "f32[64] | chunk=1" = geminifx.wait(fetch_1, 1)
    # forward: layers.1
    w_1: "f32[4, 4] | chunk=1" = geminifx.view(wait_1, 0, [4, 4])
    d: "f32[4, 4]" = aten.mm.default(c, w_1)
    e: "f32[4, 4]" = aten.clamp.default(d, 0, 1)
    f: "f32[4, 4]" = aten.sin.default(e)
    geminifx.release(wait_1, 1)
    fetch_2: "f32[64] | chunk=2" = geminifx.fetch(2, 64, torch.float32)
    wait_2: "f32[64] | chunk=2" = geminifx.wait(fetch_2, 2)
    # forward: layers.2
    w_2: "f32[4, 4] | chunk=2" = geminifx.view(wait_2, 0, [4, 4])
    g: "f32[4, 4]" = aten.mm.default(f, w_2)
    h: "f32[4, 4]" = aten.clamp.default(g, 0, 1)
    i: "f32[4, 4]" = aten.sin.default(h)
    geminifx.release(wait_2, 2)
    return {"output:0": i, "output:1": g}
