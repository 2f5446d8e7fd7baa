"""Copies start where they are waited for, on both sides of the turn."""


def before(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    # forward: 0
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    mm: "f32[4, 4]" = aten.mm.default(x, w)
    y0: "f32[4, 4]" = aten.relu.default(mm)
    fetch_1: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    wait_1: "f32[64] | chunk=1" = geminifx.wait(fetch_1, 1)
    # forward: 1
    w_1: "f32[4, 4] | chunk=1" = geminifx.view(wait_1, 0, [4, 4])
    mm_1: "f32[4, 4]" = aten.mm.default(y0, w_1)
    y1: "f32[4, 4]" = aten.relu.default(mm_1)
    flat: "f32[16]" = aten.view.default(y1, [16])
    cos: "f32[16]" = aten.cos.default(flat)
    z: "f32[4, 4]" = aten.view.default(cos, [4, 4])
    fetch_2: "f32[64] | chunk=2" = geminifx.fetch(2, 64, torch.float32)
    wait_2: "f32[64] | chunk=2" = geminifx.wait(fetch_2, 2)
    # forward: 2
    w_2: "f32[4, 4] | chunk=2" = geminifx.view(wait_2, 0, [4, 4])
    mm_2: "f32[4, 4]" = aten.mm.default(z, w_2)
    y2: "f32[4, 4]" = aten.relu.default(mm_2)
    fetch_3: "f32[64] | chunk=3" = geminifx.fetch(3, 64, torch.float32)
    wait_3: "f32[64] | chunk=3" = geminifx.wait(fetch_3, 3)
    # forward: 3
    w_3: "f32[4, 4] | chunk=3" = geminifx.view(wait_3, 0, [4, 4])
    mm_3: "f32[4, 4]" = aten.mm.default(y2, w_3)
    y3: "f32[4, 4]" = aten.relu.default(mm_3)
    fetch_4: "f32[64] | chunk=4" = geminifx.fetch(4, 64, torch.float32)
    wait_4: "f32[64] | chunk=4" = geminifx.wait(fetch_4, 4)
    # forward: 4
    w_4: "f32[4, 4] | chunk=4" = geminifx.view(wait_4, 0, [4, 4])
    mm_4: "f32[4, 4]" = aten.mm.default(y3, w_4)
    y4: "f32[4, 4]" = aten.relu.default(mm_4)
    # forward
    turn: "(f32[4, 4])" = yield [y4], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    fetch_5: "f32[64] | chunk=4" = geminifx.fetch(4, 64, torch.float32)
    wait_5: "f32[64] | chunk=4" = geminifx.wait(fetch_5, 4)
    # backward: 4
    r4: "f32[4, 4]" = aten.threshold_backward.default(tangent, y4, 0)
    w_5: "f32[4, 4] | chunk=4" = geminifx.view(wait_5, 0, [4, 4])
    d4: "f32[4, 4]" = aten.mm.default(r4, w_5)
    fetch_6: "f32[64] | chunk=3" = geminifx.fetch(3, 64, torch.float32)
    wait_6: "f32[64] | chunk=3" = geminifx.wait(fetch_6, 3)
    # backward: 3
    r3: "f32[4, 4]" = aten.threshold_backward.default(d4, y3, 0)
    w_6: "f32[4, 4] | chunk=3" = geminifx.view(wait_6, 0, [4, 4])
    d3: "f32[4, 4]" = aten.mm.default(r3, w_6)
    fetch_7: "f32[64] | chunk=2" = geminifx.fetch(2, 64, torch.float32)
    wait_7: "f32[64] | chunk=2" = geminifx.wait(fetch_7, 2)
    # backward: 2
    r2: "f32[4, 4]" = aten.threshold_backward.default(d3, y2, 0)
    w_7: "f32[4, 4] | chunk=2" = geminifx.view(wait_7, 0, [4, 4])
    d2: "f32[4, 4]" = aten.mm.default(r2, w_7)
    fetch_8: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    wait_8: "f32[64] | chunk=1" = geminifx.wait(fetch_8, 1)
    # backward: 1
    f: "f32[16]" = aten.view.default(d2, [16])
    sin: "f32[16]" = aten.sin.default(flat)
    mul: "f32[16]" = aten.mul.Tensor(f, sin)
    g: "f32[4, 4]" = aten.view.default(mul, [4, 4])
    r1: "f32[4, 4]" = aten.threshold_backward.default(g, y1, 0)
    w_8: "f32[4, 4] | chunk=1" = geminifx.view(wait_8, 0, [4, 4])
    d1: "f32[4, 4]" = aten.mm.default(r1, w_8)
    fetch_9: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait_9: "f32[64] | chunk=0" = geminifx.wait(fetch_9, 0)
    # backward: 0
    r0: "f32[4, 4]" = aten.threshold_backward.default(d1, y0, 0)
    w_9: "f32[4, 4] | chunk=0" = geminifx.view(wait_9, 0, [4, 4])
    d0: "f32[4, 4]" = aten.mm.default(r0, w_9)
    return {"gradient:input:0": d0}


def after(
    x: "f32[4, 4] | input:0",
):
    # forward
    fetch: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait: "f32[64] | chunk=0" = geminifx.wait(fetch, 0)
    # forward: 0
    w: "f32[4, 4] | chunk=0" = geminifx.view(wait, 0, [4, 4])
    mm: "f32[4, 4]" = aten.mm.default(x, w)
    y0: "f32[4, 4]" = aten.relu.default(mm)
    fetch_1: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    wait_1: "f32[64] | chunk=1" = geminifx.wait(fetch_1, 1)
    # forward: 1
    w_1: "f32[4, 4] | chunk=1" = geminifx.view(wait_1, 0, [4, 4])
    mm_1: "f32[4, 4]" = aten.mm.default(y0, w_1)
    y0_host: "f32[4, 4]" = geminifx.offload(y0)
    geminifx.depart(y0, y0_host)
    y1: "f32[4, 4]" = aten.relu.default(mm_1)
    flat: "f32[16]" = aten.view.default(y1, [16])
    cos: "f32[16]" = aten.cos.default(flat)
    y1_host: "f32[4, 4]" = geminifx.offload(y1)
    geminifx.depart(y1, y1_host)
    z: "f32[4, 4]" = aten.view.default(cos, [4, 4])
    fetch_2: "f32[64] | chunk=2" = geminifx.fetch(2, 64, torch.float32)
    wait_2: "f32[64] | chunk=2" = geminifx.wait(fetch_2, 2)
    # forward: 2
    w_2: "f32[4, 4] | chunk=2" = geminifx.view(wait_2, 0, [4, 4])
    mm_2: "f32[4, 4]" = aten.mm.default(z, w_2)
    y2: "f32[4, 4]" = aten.relu.default(mm_2)
    fetch_3: "f32[64] | chunk=3" = geminifx.fetch(3, 64, torch.float32)
    wait_3: "f32[64] | chunk=3" = geminifx.wait(fetch_3, 3)
    # forward: 3
    w_3: "f32[4, 4] | chunk=3" = geminifx.view(wait_3, 0, [4, 4])
    mm_3: "f32[4, 4]" = aten.mm.default(y2, w_3)
    y2_host: "f32[4, 4]" = geminifx.offload(y2)
    geminifx.depart(y2, y2_host)
    y3: "f32[4, 4]" = aten.relu.default(mm_3)
    fetch_4: "f32[64] | chunk=4" = geminifx.fetch(4, 64, torch.float32)
    wait_4: "f32[64] | chunk=4" = geminifx.wait(fetch_4, 4)
    # forward: 4
    w_4: "f32[4, 4] | chunk=4" = geminifx.view(wait_4, 0, [4, 4])
    mm_4: "f32[4, 4]" = aten.mm.default(y3, w_4)
    y4: "f32[4, 4]" = aten.relu.default(mm_4)
    # forward
    turn: "(f32[4, 4])" = yield [y4], [0]
    # backward
    tangent: "f32[4, 4]" = turn[0]
    fetch_5: "f32[64] | chunk=4" = geminifx.fetch(4, 64, torch.float32)
    wait_5: "f32[64] | chunk=4" = geminifx.wait(fetch_5, 4)
    # backward: 4
    r4: "f32[4, 4]" = aten.threshold_backward.default(tangent, y4, 0)
    w_5: "f32[4, 4] | chunk=4" = geminifx.view(wait_5, 0, [4, 4])
    d4: "f32[4, 4]" = aten.mm.default(r4, w_5)
    fetch_6: "f32[64] | chunk=3" = geminifx.fetch(3, 64, torch.float32)
    wait_6: "f32[64] | chunk=3" = geminifx.wait(fetch_6, 3)
    # backward: 3
    r3: "f32[4, 4]" = aten.threshold_backward.default(d4, y3, 0)
    w_6: "f32[4, 4] | chunk=3" = geminifx.view(wait_6, 0, [4, 4])
    d3: "f32[4, 4]" = aten.mm.default(r3, w_6)
    fetch_7: "f32[64] | chunk=2" = geminifx.fetch(2, 64, torch.float32)
    wait_7: "f32[64] | chunk=2" = geminifx.wait(fetch_7, 2)
    reload: "f32[4, 4]" = geminifx.reload(y2_host)
    # backward: 2
    y2_1: "f32[4, 4]" = geminifx.arrive(reload, y2_host)
    r2: "f32[4, 4]" = aten.threshold_backward.default(d3, y2_1, 0)
    w_7: "f32[4, 4] | chunk=2" = geminifx.view(wait_7, 0, [4, 4])
    d2: "f32[4, 4]" = aten.mm.default(r2, w_7)
    fetch_8: "f32[64] | chunk=1" = geminifx.fetch(1, 64, torch.float32)
    wait_8: "f32[64] | chunk=1" = geminifx.wait(fetch_8, 1)
    # backward: 1
    f: "f32[16]" = aten.view.default(d2, [16])
    reload_1: "f32[4, 4]" = geminifx.reload(y1_host)
    y1_1: "f32[4, 4]" = geminifx.arrive(reload_1, y1_host)
    flat_1: "f32[16]" = aten.view.default(y1_1, [16])
    sin: "f32[16]" = aten.sin.default(flat_1)
    mul: "f32[16]" = aten.mul.Tensor(f, sin)
    g: "f32[4, 4]" = aten.view.default(mul, [4, 4])
    r1: "f32[4, 4]" = aten.threshold_backward.default(g, y1_1, 0)
    w_8: "f32[4, 4] | chunk=1" = geminifx.view(wait_8, 0, [4, 4])
    d1: "f32[4, 4]" = aten.mm.default(r1, w_8)
    fetch_9: "f32[64] | chunk=0" = geminifx.fetch(0, 64, torch.float32)
    wait_9: "f32[64] | chunk=0" = geminifx.wait(fetch_9, 0)
    reload_2: "f32[4, 4]" = geminifx.reload(y0_host)
    # backward: 0
    y0_1: "f32[4, 4]" = geminifx.arrive(reload_2, y0_host)
    r0: "f32[4, 4]" = aten.threshold_backward.default(d1, y0_1, 0)
    w_9: "f32[4, 4] | chunk=0" = geminifx.view(wait_9, 0, [4, 4])
    d0: "f32[4, 4]" = aten.mm.default(r0, w_9)
    return {"gradient:input:0": d0}
