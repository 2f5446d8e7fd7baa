"""Each copy starts when the chunk before it has arrived; none starts in front of the turn for behind it."""


def before(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    y0: "f32[4, 4]" = aten.mm.default(x, w)
    geminifx.release(wait, 0)
    fetch_1: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    wait_1: "f32[64] | chunk=1" = geminifx.wait(fetch_1, 1)
    w_1: "f32[4, 4] | chunk=1" = geminifx.view(wait_1, 0, [4, 4])
    y1: "f32[4, 4]" = aten.mm.default(y0, w_1)
    geminifx.release(wait_1, 1)
    fetch_2: "f32[64] | chunk=2" = geminifx.fetch(2, 64, torch.float32)
    wait_2: "f32[64] | chunk=2" = geminifx.wait(fetch_2, 2)
    w_2: "f32[4, 4] | chunk=2" = geminifx.view(wait_2, 0, [4, 4])
    y2: "f32[4, 4]" = aten.mm.default(y1, w_2)
    geminifx.release(wait_2, 2)
    turn: "(f32[4, 4])" = yield [y2], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    fetch_5: "f32[64] | chunk=2" = geminifx.fetch(2, 64, torch.float32)
    wait_5: "f32[64] | chunk=2" = geminifx.wait(fetch_5, 2)
    w_5: "f32[4, 4] | chunk=2" = geminifx.view(wait_5, 0, [4, 4])
    d2: "f32[4, 4]" = aten.mm.default(tangent, w_5)
    geminifx.release(wait_5, 2)
    fetch_4: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    wait_4: "f32[64] | chunk=1" = geminifx.wait(fetch_4, 1)
    w_4: "f32[4, 4] | chunk=1" = geminifx.view(wait_4, 0, [4, 4])
    d1: "f32[4, 4]" = aten.mm.default(d2, w_4)
    geminifx.release(wait_4, 1)
    fetch_3: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait_3: "f32[64] | chunk=0" = geminifx.wait(fetch_3, 0)
    w_3: "f32[4, 4] | chunk=0" = geminifx.view(wait_3, 0, [4, 4])
    d0: "f32[4, 4]" = aten.mm.default(d1, w_3)
    geminifx.release(wait_3, 0)
    return {"gradient:input:0": d0}


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    fetch_1: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    y0: "f32[4, 4]" = aten.mm.default(x, w)
    geminifx.release(wait, 0)
    wait_1: "f32[64] | chunk=1" = geminifx.wait(fetch_1, 1)
    fetch_2: "f32[64] | chunk=2" = geminifx.fetch(2, 64, torch.float32)
    w_1: "f32[4, 4] | chunk=1" = geminifx.view(wait_1, 0, [4, 4])
    y1: "f32[4, 4]" = aten.mm.default(y0, w_1)
    geminifx.release(wait_1, 1)
    wait_2: "f32[64] | chunk=2" = geminifx.wait(fetch_2, 2)
    w_2: "f32[4, 4] | chunk=2" = geminifx.view(wait_2, 0, [4, 4])
    y2: "f32[4, 4]" = aten.mm.default(y1, w_2)
    geminifx.release(wait_2, 2)
    turn: "(f32[4, 4])" = yield [y2], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    fetch_5: "f32[64] | chunk=2" = geminifx.fetch(2, 64, torch.float32)
    wait_5: "f32[64] | chunk=2" = geminifx.wait(fetch_5, 2)
    fetch_4: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    w_5: "f32[4, 4] | chunk=2" = geminifx.view(wait_5, 0, [4, 4])
    d2: "f32[4, 4]" = aten.mm.default(tangent, w_5)
    geminifx.release(wait_5, 2)
    wait_4: "f32[64] | chunk=1" = geminifx.wait(fetch_4, 1)
    fetch_3: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    w_4: "f32[4, 4] | chunk=1" = geminifx.view(wait_4, 0, [4, 4])
    d1: "f32[4, 4]" = aten.mm.default(d2, w_4)
    geminifx.release(wait_4, 1)
    wait_3: "f32[64] | chunk=0" = geminifx.wait(fetch_3, 0)
    w_3: "f32[4, 4] | chunk=0" = geminifx.view(wait_3, 0, [4, 4])
    d0: "f32[4, 4]" = aten.mm.default(d1, w_3)
    geminifx.release(wait_3, 0)
    return {"gradient:input:0": d0}
